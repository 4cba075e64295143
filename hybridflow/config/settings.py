"""The keys and values that files and the command line give, layer over layer, with the place of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from hybridflow.config import verl_keys
from hybridflow.config.build import found, keys_of, suggestion
from hybridflow.config.schema import RENAMED, AlgorithmConfig, Config
from hybridflow.config.tree import Setting, insert, leaves, lookup, merged
from hybridflow.config.verl import OF_A_FORK, OF_THE_MACHINE, PAGE, Translated, VerlSet
from hybridflow.config.verl_values import is_off
from hybridflow.errors import FieldError, FieldReport, FieldWarning

KNOWN_KEYS = tuple(key for key in keys_of(Config) if key != "algorithm.options")
SECTIONS = frozenset(key.partition(".")[0] for key in KNOWN_KEYS)
MAPPINGS: Mapping[str, Mapping[str, object]] = {
    f"{section}.{name}": value
    for section, keys in vars(Config()).items()
    for name, value in vars(keys).items()
    if isinstance(value, Mapping)
}
"""The keys whose value is a mapping, such as `placement.pools`, with their defaults."""
CHOICES = ("algorithm", "algorithm.name")
DROPPED = object()
"""Value of a key that `~key` takes out of the layers below."""


VERLS_DEFAULT = "verl's default"
"""Place of a value that verl has where nobody gave one."""
BOTH = frozenset({"algorithm.gamma"})
"""Options that are called so here and in verl; no other key of ours has a name of verl's."""


@dataclass(frozen=True)
class Chosen:
    """What translations depend on of an algorithm."""

    options: Mapping[str, object]
    """With their defaults."""
    has_critic: bool


@dataclass
class Settings:
    """What was given; a later layer wins over an earlier one, and within a layer our keys over verl's.

    A list or a mapping such as `placement.pools` is replaced as a whole; a dotted key (`placement.pools.main`) changes one
    entry of a mapping.
    """

    resolve: Callable[[object, Mapping[str, object]], object]
    """Replaces the interpolations in a value by what they refer to."""
    choose: Callable[[str], Chosen | None]
    """What there is to know of the algorithm of a name; None where there is none."""
    values: dict[str, object] = field(default_factory=dict)
    """As a tree, not resolved."""
    reports: list[FieldReport] = field(default_factory=list)
    _verl_values: Mapping[str, object] = field(default_factory=dict)  # kept for interpolations that name verl's keys
    _places: dict[str, str] = field(default_factory=dict)
    _equal: list[tuple[Setting, str, str]] = field(default_factory=list)

    def take(self, layers: Sequence[Sequence[Setting]], *, has_file: bool) -> None:
        """Put the layers over one another, the lowest first; where any key of verl's is among them, on verl's defaults."""
        given = [[self._renamed(leaf) for setting in layer for leaf in _leaves(setting)] for layer in layers]
        given = [_without_dropped(layer, given[number + 1 :]) for number, layer in enumerate(given)]
        ours, verls = self._divided(given)
        if verls:
            ours = self._with_verls(ours, verls, has_file=has_file)
        for layer in ours:
            # The algorithm is chosen first, so that options before and after refine it.
            for setting in sorted(layer, key=lambda setting: setting.key not in CHOICES):
                self._put(setting.key, setting.value, setting.place)
        self._check_equal()

    def _renamed(self, setting: Setting) -> Setting:
        """Under the present name of its key."""
        if setting.key not in RENAMED:
            return setting
        now = RENAMED[setting.key]
        self.reports.append(FieldWarning(setting.key, f"is called {now} now, and is taken as that", setting.place))
        return replace(setting, key=now)

    def place_of(self, key: str) -> str:
        """Where `key`, or the closest section around it, was given; empty where it was not."""
        while key and key not in self._places:
            key = key.rpartition(".")[0]
        return self._places.get(key, "")

    def context(self) -> dict[str, object]:
        """Everything given, verl's keys too: what interpolations can refer to."""
        return merged(self._verl_values, self.values)

    def _divided(self, leaves: Sequence[Sequence[Setting]]) -> tuple[list[list[Setting]], VerlSet]:
        """Our keys by layer, and verl's as one set."""
        names = [name for layer in leaves if (name := _algorithm_in(layer))]
        verls = VerlSet(lambda value: self.resolve(value, context), reports=self.reports)
        ours: list[list[Setting]] = [[] for _ in leaves]
        raw: dict[str, object] = {}
        for number, layer in enumerate(leaves):
            for setting in layer:
                if _is_ours(setting.key, names) or not verl_keys.is_verls(verl_keys.full_name(setting.key)):
                    ours[number].append(setting)
                    insert(raw, setting.key, setting.value)
                else:
                    verls.add(setting, number)
        if verls:
            self._verl_values = _with_short_forms(verls.tree)
        context = merged(merged(_verls_defaults(), self._verl_values) if verls else {}, raw)
        return ours, verls

    def _with_verls(self, ours: Sequence[list[Setting]], verls: VerlSet, *, has_file: bool) -> list[list[Setting]]:
        """Layers with what verl's keys make of ours in them; the lowest, new one is that of verl's defaults."""
        chosen = list(verls.algorithm_name())
        name, since = _last_choice(ours, chosen)
        verls.algorithm, algorithm = name, self.choose(name)
        said = {setting.key: str(setting.value) for layer in ours for setting in layer}
        verls.pool, verls.engine = said.get("placement.pools.main", ""), said.get("rollout.engine", "")
        options = algorithm.options if algorithm else {}
        values = [one for one in chosen if one.setting.key != "algorithm.name" and one.setting.key.partition(".")[2] in options]
        has_critic = algorithm is None or algorithm.has_critic
        values += verls.translated(options, has_critic=has_critic)
        self._equal = list(verls.equal_keys(has_critic=has_critic))
        place = next((one.setting.place for one in chosen if one.setting.value == name), "") or VERLS_DEFAULT
        layers = [[Setting("algorithm.name", name, place)]]
        for number, layer in enumerate(ours):
            layers.append([one for one in layer if not (number < since and one.key.startswith("algorithm"))])
            layers[-1] = [one for one in layers[-1] if self._is_taken(one, options) and one.key not in CHOICES]
        for one in values:
            if one.layer >= 0:
                layers[one.layer + 1].insert(0, one.setting)
            elif not (has_file and one.setting.key.startswith(OF_THE_MACHINE)):
                layers[0].append(replace(one.setting, place=VERLS_DEFAULT))
        self._tell_defaults(layers, options)
        return layers

    def _is_taken(self, setting: Setting, options: Mapping[str, object]) -> bool:
        """False for what is no key of ours or verl's, told where it is on or near to one, and for a gamma of no use."""
        section, _, option = setting.key.partition(".")
        is_known = setting.key in KNOWN_KEYS or setting.key in CHOICES or any(setting.key.startswith(f"{m}.") for m in MAPPINGS)
        if is_known or (section == "algorithm" and option in options):
            return True
        near = suggestion(setting.key, KNOWN_KEYS, verl_keys.stands_for())
        if setting.key not in BOTH and (near.startswith("; did you mean") or not is_off(setting.value)):
            problem = f"is neither a key of ours nor one of verl's that is known here{near} {PAGE} lists verl's. {OF_A_FORK}"
            self.reports.append(FieldError(setting.key, problem, setting.place))
        return False

    def _tell_defaults(self, layers: Sequence[Sequence[Setting]], options: Mapping[str, object]) -> None:
        """One line for what verl has otherwise than we where nobody said anything."""
        given = {setting.key for layer in layers[1:] for setting in layer}
        own = {f"{name}.{key}": value for name, section in vars(Config()).items() for key, value in vars(section).items()}
        own |= {f"algorithm.{option}": value for option, value in options.items()}
        filled = [one for one in layers[0] if one.key not in given and _text(own.get(one.key)) != _text(one.value)]
        if told := [f"{one.key}={_text(one.value)}" for one in filled if one.key not in CHOICES]:
            reason = f"what they leave out has verl's default, not ours ({PAGE}): {', '.join(told)}"
            self.reports.append(FieldWarning("verl's keys", reason))

    def _check_equal(self) -> None:
        """The keys of verl's that may only repeat what another says."""
        for setting, ours, words in self._equal:
            other = self.resolve(lookup(self.values, ours), self.context())
            if other is not None and setting.value != other:
                because = f", {words}" if words else ""
                problem = f"found {found(setting.value)}, but {ours} is {other!r}{because}. Set it to {other!r}"
                self.reports.append(FieldError(setting.key, problem, setting.place))

    def _put(self, key: str, value: object, place: str) -> None:
        if key == "algorithm" and isinstance(value, str):
            self._forget_algorithm()
            key = "algorithm.name"
        if key == "algorithm.name" and value != lookup(self.values, "algorithm.name"):
            self._forget_algorithm()
        mapping = key.rpartition(".")[0]
        if mapping in MAPPINGS and lookup(self.values, mapping) is None:
            insert(self.values, mapping, dict(MAPPINGS[mapping]))
        if not insert(self.values, key, value):
            self.reports.append(FieldError(key, "the section around it was given as one value, not as keys", place))
        self._forget_places(key)
        self._places[key] = place

    def _forget_algorithm(self) -> None:
        self.values.pop("algorithm", None)
        self._forget_places("algorithm")

    def _forget_places(self, section: str) -> None:
        self._places = {key: place for key, place in self._places.items() if not f"{key}.".startswith(f"{section}.")}


def _leaves(setting: Setting) -> list[Setting]:
    given = leaves({setting.key: setting.value}, whole=MAPPINGS)
    # A section whose keys are all commented out changes nothing.
    return [Setting(*leaf, setting.place) for leaf in given if not (leaf[0] in SECTIONS and leaf[1] in (None, {}))]


def _without_dropped(layer: Sequence[Setting], above: Sequence[Sequence[Setting]]) -> list[Setting]:
    """`layer` without what layers above it drop, and without its own word for that."""
    dropped = [f"{verl_keys.full_name(one.key)}." for other in above for one in other if one.value is DROPPED]
    kept = [one for one in layer if one.value is not DROPPED]
    return [one for one in kept if not f"{verl_keys.full_name(one.key)}.".startswith(tuple(dropped))]


def _algorithm_in(layer: Iterable[Setting]) -> str:
    """The name of the algorithm that our keys give; empty where they give none."""
    names = [str(setting.value) for setting in layer if setting.key in CHOICES]
    return names[-1] if names else ""


def _last_choice(ours: Sequence[Sequence[Setting]], chosen: Sequence[Translated]) -> tuple[str, int]:
    """The algorithm, and the layer since which it is this one: options of layers below belong to another."""
    verls = {one.layer: str(one.setting.value) for one in chosen if one.setting.key == "algorithm.name"}
    name, since = verls.get(-1, ""), 0
    for number, layer in enumerate(ours):
        choice = _algorithm_in(layer) or verls.get(number, "")
        if choice and choice != name:
            name, since = choice, number
    return name or AlgorithmConfig.name, since


def _is_ours(key: str, algorithms: Iterable[str]) -> bool:
    if key in KNOWN_KEYS or key in BOTH or any(key.startswith(f"{mapping}.") for mapping in MAPPINGS):
        return True
    # An algorithm of the user's own may have an option that is called like a key of verl's.
    return key.startswith("algorithm.") and any(":" in name for name in algorithms)


def _with_short_forms(tree: Mapping[str, object]) -> dict[str, object]:
    """verl's keys, and those that may be called without their beginning by that name too."""
    short: dict[str, object] = {}
    for prefix in verl_keys.SHORT_FORMS:
        section = tree.get(prefix.removesuffix("."))
        short = merged(section, short) if isinstance(section, Mapping) else short
    return merged(short, tree)


@cache
def _verls_defaults() -> Mapping[str, object]:
    tree: dict[str, object] = {}
    for key in verl_keys.KEYS.values():
        if key.default is not None:
            insert(tree, key.name, key.default)
    return tree


def _text(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value).replace(".0", "")
