"""The keys and values that files and the command line give, layer over layer, with the place of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from hybridflow.config import verl_keys
from hybridflow.config.build import keys_of
from hybridflow.config.schema import Config
from hybridflow.config.verl_values import UntranslatableError
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
CHOICES_OF_ALGORITHM = frozenset({"algorithm", "algorithm.name", "algorithm.adv_estimator"})


@dataclass(frozen=True)
class Setting:
    """One key with its value, as given."""

    key: str
    value: object
    place: str
    """`file:line` or `command line`."""


@dataclass
class Settings:
    """What was given so far; a later layer wins over an earlier one.

    A list or a mapping such as `placement.pools` is replaced as a whole; a dotted key (`placement.pools.main`) changes one
    entry of a mapping.
    """

    resolve: Callable[[object, Mapping[str, object]], object]
    """Replaces the interpolations in a value by what they refer to."""
    values: dict[str, object] = field(default_factory=dict)
    """As a tree, not resolved."""
    reports: list[FieldReport] = field(default_factory=list)
    _verl_values: dict[str, object] = field(default_factory=dict)  # kept for interpolations that name verl's keys
    _places: dict[str, str] = field(default_factory=dict)

    def apply(self, layer: Iterable[Setting]) -> None:
        """Put a layer over what is there. The algorithm is chosen first, so that options before and after refine it."""
        settings = [leaf for setting in layer for leaf in _leaves(setting)]
        for setting in sorted(settings, key=lambda setting: setting.key not in CHOICES_OF_ALGORITHM):
            translation = None if self._is_ours(setting.key) else verl_keys.find(setting.key)
            if translation is None:
                self._put(setting.key, setting.value, setting.place)
            else:
                self._translate(setting, translation)

    def place_of(self, key: str) -> str:
        """Where `key`, or the closest section around it, was given; empty where it was not."""
        while key and key not in self._places:
            key = key.rpartition(".")[0]
        return self._places.get(key, "")

    def context(self) -> dict[str, object]:
        """Everything given, verl's keys too: what interpolations can refer to."""
        return _merged(self._verl_values, self.values)

    def get(self, key: str) -> object:
        """The value of `key`, verl's or ours, as given so far; None where it was not given."""
        return self.resolve(self._unresolved(key), self.context())

    def _unresolved(self, key: str) -> object:
        value: object = self.context()
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def _is_ours(self, key: str) -> bool:
        if key in KNOWN_KEYS or any(key.startswith(f"{mapping}.") for mapping in MAPPINGS):
            return True
        # An algorithm of the user's own may have an option that is called like a key of verl's.
        return key.startswith("algorithm.") and ":" in str(self._unresolved("algorithm.name"))

    def _translate(self, setting: Setting, translation: verl_keys.Translation) -> None:
        try:
            value = self.resolve(setting.value, self.context())
            _insert(self._verl_values, verl_keys.full_name(setting.key), value)
            if translation.warning and value is not None:
                self.reports.append(FieldWarning(setting.key, translation.warning, setting.place))
            for key, translated in translation.apply(value, self.get).items():
                self._put(key, translated, f"{setting.place} ({setting.key})")
        except (UntranslatableError, ValueError) as error:  # the latter of an interpolation that cannot be resolved
            self.reports.append(FieldError(setting.key, str(error).partition("\n")[0], setting.place))

    def _put(self, key: str, value: object, place: str) -> None:
        if key == "algorithm" and isinstance(value, str):
            self._forget_algorithm()
            key = "algorithm.name"
        if key == "algorithm.name" and value != self._unresolved("algorithm.name"):
            self._forget_algorithm()
        mapping = key.rpartition(".")[0]
        if mapping in MAPPINGS and self._unresolved(mapping) is None:
            _insert(self.values, mapping, dict(MAPPINGS[mapping]))
        if value is None and key in SECTIONS:
            return  # a section whose keys are all commented out changes nothing
        if not _insert(self.values, key, value):
            self.reports.append(FieldError(key, "the section around it was given as one value, not as keys", place))
        self._forget_places(key)
        self._places[key] = place

    def _forget_algorithm(self) -> None:
        self.values.pop("algorithm", None)
        self._forget_places("algorithm")

    def _forget_places(self, section: str) -> None:
        self._places = {key: place for key, place in self._places.items() if not f"{key}.".startswith(f"{section}.")}


def _leaves(setting: Setting) -> Iterator[Setting]:
    is_section = isinstance(setting.value, Mapping) and setting.key not in MAPPINGS
    if not is_section or not (setting.value or setting.key in SECTIONS):
        yield setting
        return
    assert isinstance(setting.value, Mapping)
    for name, value in setting.value.items():
        yield from _leaves(Setting(f"{setting.key}.{name}", value, setting.place))


def _insert(tree: dict[str, object], key: str, value: object) -> bool:
    """Set the dotted `key`; False where something on the way is not a section."""
    *sections, name = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            return False
        tree = child
    tree[name] = value
    return True


def _merged(under: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    merged = {**under, **over}
    for key in under.keys() & over.keys():
        below, above = under[key], over[key]
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            merged[key] = _merged(below, above)
    return merged
