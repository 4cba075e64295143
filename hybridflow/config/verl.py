"""verl's keys as one set, and what they make of our configuration: never a matter of the order in which they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from hybridflow.config import verl_keys
from hybridflow.config.tree import Setting, insert, lookup
from hybridflow.config.verl_keys import FREE, KEYS, Key
from hybridflow.config.verl_rules import RULES
from hybridflow.config.verl_values import CONVERSIONS, UntranslatableError, is_off
from hybridflow.errors import FieldError, FieldReport, FieldWarning

PAGE = "docs/from_verl.md"
OF_A_FORK = "A fork of verl may read it; here nothing does: take it out, or write that (docs/writing_an_algorithm.md)"
UNKNOWN = "verl's key is not known here. {}See " + PAGE + " for all that are; `~KEY` takes it out of a file. " + OF_A_FORK
MAY_LACK = {"clip", "dual_clip", "gamma", "gae_lambda", "value_clip", "value_loss_aggregation", "loss_length"}
MAY_LACK |= {"kl_target", "kl_horizon", "informative"}
"""Options that verl, too, leaves alone where the algorithm has no use for them."""
OF_THE_MACHINE = ("placement.", "trackers.", "run.folder", "rollout.tensor_parallel")
"""What verl's defaults say of these counts without a file of ours alone."""


@dataclass(frozen=True)
class Translated:
    """A value for a key of ours."""

    setting: Setting
    layer: int
    """Of the keys that it comes from the highest; -1 where none of them is given."""
    source: Setting | None = None
    """The key of verl's, of those that it comes from, that says other than verl's default; None where all say that."""


@dataclass
class VerlSet:
    """All keys of verl's that were given, by their full names, whatever the order."""

    resolve: Callable[[object], object]
    """Replaces interpolations.

    Raises:
        ValueError: one refers to nothing.
    """
    algorithm: str = ""
    pool: str = ""
    engine: str = ""
    reports: list[FieldReport] = field(default_factory=list)
    tree: dict[str, object] = field(default_factory=dict)
    _given: dict[str, tuple[Setting, int]] = field(default_factory=dict)
    _reads: list[str] = field(default_factory=list)
    _counted: set[str] = field(default_factory=set)
    _asked: str = ""
    """The key that was read last, given or not."""

    def add(self, setting: Setting, layer: int) -> None:
        """Take a key; a later one of the same name wins."""
        name = verl_keys.full_name(setting.key)
        self._given[name] = (setting, layer)
        insert(self.tree, name, setting.value)

    def __bool__(self) -> bool:
        return bool(self._given)

    def __call__(self, key: str) -> object:
        """The value of `key`, or verl's default."""
        self._asked = key
        self._reads += [name for name in self._given if f"{name}.".startswith(f"{key}.")]
        value = lookup(self.tree, key)
        if value is None and key in KEYS:
            value = KEYS[key].default  # an empty value is that of a shell's variable that nobody has set
        return self.resolve(value)

    def has(self, key: str) -> bool:
        """Whether `key` is given, and not as null."""
        return key in self._given and self(key) is not None

    def algorithm_name(self) -> Iterator[Translated]:
        """What the two keys of the algorithm make."""
        yield from self._of_rule("algorithm")

    def translated(self, options: Iterable[str], *, has_critic: bool) -> Iterator[Translated]:
        """Values for our keys, those of verl's defaults among them; `options` are the chosen algorithm's."""
        known = {f"algorithm.{option}" for option in options}
        rules = dict.fromkeys(key.how[1:] for key in KEYS.values() if key.how.startswith("@") and key.how != "@algorithm")
        values = [value for rule in rules for value in self._of_rule(rule)]
        values += [value for key in KEYS.values() for value in self._of_key(key)]
        for value in values:
            key = value.setting.key
            if key.startswith("algorithm.") and key not in known:
                self._lack(value, is_known=bool(known))
            else:
                yield value
        self._tell_others(has_critic=has_critic)

    def equal_keys(self, *, has_critic: bool) -> Iterator[tuple[Setting, str, str]]:
        """The keys that may only say what another says: with that of ours, and why."""
        for name, (setting, _) in self._given.items():
            counts = has_critic or not name.startswith("critic.")
            if (key := KEYS.get(name)) and key.how == "same" and setting.value is not None and counts:
                yield replace(setting, value=self(name)), key.ours, key.words

    def _of_rule(self, rule: str) -> Iterator[Translated]:
        own = {key.name for key in KEYS.values() if key.how == f"@{rule}"}
        self._reads.clear()
        try:
            for ours, value in RULES[rule](self):
                reads = [name for name in self._reads if (found := verl_keys.find(name)) and found.name in own]
                yield self._translated(ours, value, reads)
                self._reads.clear()
        except (UntranslatableError, ValueError) as error:
            name = next((name for name in (*reversed(self._reads), self._asked) if name in own), min(own))
            self._refuse(name, str(error))

    def _of_key(self, key: Key) -> Iterator[Translated]:
        """For a key that has one of ours to itself."""
        is_plain = key.how == "=" or key.how in CONVERSIONS
        below = [name for name in self._given if name.startswith(f"{key.name}.")] if key.ours in FREE else []
        names = [name for name in (key.name, *below) if name in self._given]
        if not is_plain or not (names or key.is_filled):
            return
        try:
            if (value := self(key.name)) is None and not key.is_filled:
                return  # as in verl where it is left out
            value = CONVERSIONS[key.how](value) if key.how in CONVERSIONS else value
        except (UntranslatableError, ValueError) as error:
            self._refuse(key.name, str(error))
            return
        entries = value.items() if below and isinstance(value, Mapping) else ()
        for entry, element in entries:
            yield self._translated(f"{key.ours}.{entry}", element, names)
        if not below:
            yield self._translated(key.ours, value, names)

    def _translated(self, ours: str, value: object, names: Iterable[str]) -> Translated:
        self._counted.update(names)
        if not (sources := [self._given[name] for name in names]):
            return Translated(Setting(ours, value, ""), -1)
        changed = [self._given[name][0] for name in names if (key := KEYS.get(name)) is None or self(name) != key.default]
        setting = (changed or [source for source, _ in sources])[-1]
        layer = max(layer for _, layer in sources)
        return Translated(Setting(ours, value, f"{setting.place} ({setting.key})"), layer, changed[-1] if changed else None)

    def _lack(self, value: Translated, *, is_known: bool) -> None:
        """The algorithm has no such option: a mistake where that would change what is learned."""
        option, source = value.setting.key.partition(".")[2], value.source
        if is_known and source is not None and option not in MAY_LACK and not is_off(value.setting.value):
            advice = f"Leave it at verl's default, or set another algorithm ({PAGE})"
            problem = f"algorithm {self.algorithm!r} has no {option!r} to set to {value.setting.value!r}. {advice}"
            self.reports.append(FieldError(source.key, problem, source.place))

    def _tell_others(self, *, has_critic: bool) -> None:
        """What changes nothing is told in one line; what has no equivalent is refused."""
        idle = []
        for name, (setting, _) in self._given.items():
            key = verl_keys.find(name)
            if key is None:
                self._tell_unknown(name, setting)
            elif key.how == "only" and not self._passes(key, name):
                allowed = f"only {key.default!r} has an equivalent here: " if key.name == name and key.default else ""
                self._refuse(name, f"found {setting.value!r}; {allowed}{key.words}")
            elif key.how in ("-", "only") or name not in self._counted:
                is_of_critic = name.startswith("critic.") and not has_critic
                if key.how != "same" or is_of_critic:
                    idle += [setting.key] if not is_off(setting.value) and setting.value != key.default else []
        if idle:
            reason = f"change nothing beside the others ({PAGE} says why): {', '.join(idle)}"
            self.reports.append(FieldWarning("verl's keys", reason))

    def _tell_unknown(self, name: str, setting: Setting) -> None:
        if not is_off(setting.value):
            self._refuse(name, UNKNOWN.format(verl_keys.suggestion(name)))
        elif near := verl_keys.misspelt(name):  # switched off under a name that nobody reads, what was meant stays on
            self._refuse(name, UNKNOWN.format(near))

    def _passes(self, key: Key, name: str) -> bool:
        value = self(name)
        if is_off(value) and key.default is not True:
            return True
        return name == key.name and (value == key.default or str(value) in key.ours.split())

    def _refuse(self, name: str, problem: str) -> None:
        setting = self._given[name][0] if name in self._given else Setting(name, None, "")
        self.reports.append(FieldError(setting.key, problem.partition("\n")[0], setting.place))
