"""From a plain tree of values to frozen dataclasses, collecting every error on the way. pydantic judges the single value."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from annotated_types import Interval
from pydantic import ConfigDict, TypeAdapter, ValidationError

from hybridflow.config.tree import join, leaves
from hybridflow.errors import FieldError
from hybridflow.registry import nearest

T = TypeVar("T")

STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
WANTED = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null", object: "any value"}
KINDS = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}
TRUTHS = {"yes": True, "on": True, "no": False, "off": False}


class UnfitError(ValueError):
    """A value does not fit the type of its key."""


class Builder:
    """Builds dataclasses; `errors` grows instead of an exception being raised at the first.

    `place_of` answers where a key was given; `known_keys`, and `aliases` with what they stand for, are what a misspelt key is
    compared with.

    Example:
        >>> from hybridflow.config.schema import RunConfig
        >>> builder = Builder(lambda key: "run.yaml:3", known_keys=["seed", "folder"])
        >>> builder.build(RunConfig, {"seed": "one", "foldr": "x"}).seed  # the default in place of what does not fit
        0
        >>> [str(error) for error in builder.errors]
        ["run.yaml:3: foldr: no such key; did you mean 'folder'?", "run.yaml:3: seed: found 'one' (text); needed: an ..."]
    """

    def __init__(self, place_of: Callable[[str], str], known_keys: Iterable[str], aliases: Mapping[str, str] | None = None):
        self.place_of = place_of
        self.known_keys, self.aliases = list(known_keys), aliases or {}
        self.errors: list[FieldError] = []

    def build(self, kind: type[T], values: object, *, path: str = "", default: T | None = None) -> T | None:
        """An instance of dataclass `kind` with `values` over those of `default`.

        A value that does not fit is answered with an error and its default. None where a key without default is not given.
        """
        if not isinstance(values, Mapping):
            if values is not None:  # a section whose keys are all commented out reads as null
                self.add(path, f"found {found(values)}; this is a section with keys of its own")
            values = {}
        members = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
        hints = get_type_hints(kind, include_extras=True)
        for name in [name for name in values if name not in members]:
            self._unknown(join(path, name), values[name])
        built: dict[str, object] = {}
        for name, field in members.items():
            key, built[name] = join(path, name), default_of(field) if default is None else vars(default)[name]
            if name in values:
                built[name] = self._value(key, hints[name], values[name], built[name])
            elif built[name] is MISSING:
                self.add(key, f"is missing; needed: {wanted(hints[name])}")
        if MISSING in built.values():
            return None
        try:
            return kind(**built)
        except ValueError as error:  # raised by a check of the dataclass itself
            self.add(path, str(error))
            return default

    def add(self, key: str, problem: str) -> None:
        """Note an error at `key`."""
        self.errors.append(FieldError(key, problem, self.place_of(key)))

    def _unknown(self, key: str, value: object) -> None:
        for leaf, _ in leaves({key: value}):
            self.add(leaf, f"no such key{suggestion(leaf, self.known_keys, self.aliases)}")

    def _value(self, key: str, hint: object, value: object, default: object) -> object:
        if isinstance(hint, type) and is_dataclass(hint):
            built = self.build(hint, value, path=key, default=None if default is MISSING else default)
            return MISSING if built is None else built
        is_mapping = get_origin(hint) is Mapping
        if is_mapping and isinstance(value, Mapping):
            # An entry that does not fit stays as text: other keys may refer to it by its name.
            return {str(name): self._value(join(key, name), get_args(hint)[1], v, str(v)) for name, v in value.items()}
        if (element := _element_class(hint)) is not None and value is not None:
            return self._sections(key, element, value)
        try:
            return convert(value, hint)
        except UnfitError as error:
            self.add(key, str(error))
            # Whoever meant other entries than the default's must not be told what is wrong with those.
            return {} if is_mapping else default

    def _sections(self, key: str, kind: type, value: object) -> tuple[object, ...]:
        """A list of sections with the same keys; a single one may stand for a list of one."""
        known, built = self.known_keys, list[object]()
        for number, element in enumerate(value if isinstance(value, list | tuple) else [value]):
            path = join(key, number)
            self.known_keys = [*known, *keys_of(kind, path)]
            built.append(self.build(kind, element, path=path))
        self.known_keys = known
        return tuple(section for section in built if section is not None)


def _element_class(hint: object) -> type | None:
    """The dataclass of which `hint` is a tuple of any length; None where it is something else."""
    members = get_args(hint) if get_origin(hint) is tuple else ()
    is_list = len(members) == 2 and members[1] is Ellipsis and isinstance(members[0], type) and is_dataclass(members[0])
    return members[0] if is_list else None


def convert(value: object, hint: object) -> object:
    """`value` as type `hint`, by lossless readings only: see `_readings`.

    Example:
        >>> convert("1e-6", float), convert("a.parquet", tuple[str, ...]), convert("off", bool)
        (1e-06, ('a.parquet',), False)

    Raises:
        UnfitError: it is not of that type; the message says what was found and what is needed.
    """
    adapter: TypeAdapter[object] = TypeAdapter(hint, config=STRICT)  # type: ignore[arg-type]
    for reading in _readings(value):
        try:
            return adapter.validate_python(reading)
        except ValidationError:
            continue
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        raise UnfitError(f"found {found(value)}; allowed: {', '.join(choices)}{nearest(str(value), choices)}")
    is_quotable = str in (hint, *get_args(hint)) and isinstance(value, int | float)
    advice = ". Quote it to have it read as text" if is_quotable else ""
    raise UnfitError(f"found {found(value)}; needed: {wanted(hint)}{advice}")


def _readings(value: object) -> Iterator[object]:
    """As it stands; a list or a scalar as a tuple; text such as "1e-6" or 1_000 as a number, and yes, no, on or off as true
    or false, where nothing but these is asked for."""
    yield value
    if isinstance(value, Mapping):
        yield {str(name): element for name, element in value.items()}
    elif value is not None:
        elements = tuple(value) if isinstance(value, list | tuple) else (value,)
        yield elements
        yield _as_number(value)
        yield tuple(map(_as_number, elements))
        yield TRUTHS.get(value.lower(), value) if isinstance(value, str) else value


def _as_number(value: object) -> object:
    if not isinstance(value, str) or re.match(r"[-+]?0[0-9]", value):  # 010 is 8 for some readers, and 10 for others
        return value
    try:
        return int(value) if re.fullmatch(r"[-+]?[0-9]{1,3}(_[0-9]{3})+", value) else float(value)
    except ValueError:
        return value


def found(value: object) -> str:
    """A value with the kind of thing it is, for messages.

    Example:
        >>> found(3), found(None), found([1])
        ('3 (integer)', 'null', '[1] (list)')
    """
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return f"{text} ({KINDS.get(type(value), type(value).__name__)})"


def wanted(hint: object) -> str:
    """What type `hint` allows, in words.

    Example:
        >>> wanted(tuple[str, ...]), wanted(Literal["linear", "cosine"]), wanted(int | None)
        ('a list, each element text', 'one of linear, cosine', 'an integer or null')
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [f" of {_range_in_words(note)}" for note in members[1:] if isinstance(note, Interval)]
        return wanted(members[0]) + "".join(ranges)
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(member) for member in members)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}" if len(members) > 1 else str(members[0])
    if (section := _element_class(hint)) is not None:
        return f"a list of mappings with {', '.join(keys_of(section))}"
    if origin is tuple and members[-1] is Ellipsis:
        return f"a list, each element {wanted(members[0])}"
    if origin is tuple:
        return f"a list of {len(members)} ({', '.join(wanted(member) for member in members)})"
    if origin in (Mapping, dict):
        return f"a mapping from names to {wanted(members[1])}"
    return WANTED.get(hint, str(hint)) if isinstance(hint, type) else str(hint)


def _range_in_words(allowed: Interval) -> str:
    bounds = {"at least": allowed.ge, "more than": allowed.gt, "at most": allowed.le, "less than": allowed.lt}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)


def suggestion(key: str, known_keys: Iterable[str], aliases: Mapping[str, str]) -> str:
    """What to say of an unknown key: the nearest known one in its own section, else anywhere, else by its last word.

    A bare last word is answered with every key that ends in it. `aliases` are compared too, where they are very near.

    Example:
        >>> keys = ["actor.learning_rate", "critic.learning_rate", "rollout.top_p"]
        >>> suggestion("rolout.top_p", keys, {})
        "; did you mean 'rollout.top_p'?"
        >>> suggestion("lr", keys, {"actor.optim.lr": "actor.learning_rate"})
        "; did you mean 'actor.learning_rate'?"
        >>> suggestion("rollout.beams", keys, {})
        '. Keys of this section: top_p'
    """
    known = list(known_keys)
    if "." not in key:
        words = [other for other in known if last(other) == key]
        words = words or list(dict.fromkeys(ours for alias, ours in aliases.items() if ours and last(alias) == key))
        if words:
            return f"; did you mean {' or '.join(map(repr, words))}?"
    section, _, name = key.rpartition(".")
    siblings = {last(other): other for other in known if other.rpartition(".")[0] == section}
    anywhere = {other: other for other in known}
    by_name = {last(other): other for other in reversed(known)}
    very_near = (key, anywhere | {alias: alias for alias in aliases}, 0.9)
    for asked, candidates, cutoff in (very_near, (name, siblings, 0.6), (key, anywhere, 0.75), (name, by_name, 0.75)):
        if words := difflib.get_close_matches(asked, candidates, 1, cutoff):
            return f"; did you mean {candidates[words[0]]!r}?"
    if siblings:
        return f". Keys of this section: {', '.join(siblings)}"
    return f". Sections: {', '.join(dict.fromkeys(other.partition('.')[0] for other in known))}"


def keys_of(kind: type, path: str = "") -> list[str]:
    """The dotted keys of dataclass `kind` and the dataclasses in it, in the order of their fields."""
    hints, keys = get_type_hints(kind), []
    for field in fields(kind):
        hint, key = hints[field.name], join(path, field.name)
        keys += keys_of(hint, key) if isinstance(hint, type) and is_dataclass(hint) else [key]
    return keys


def default_of(field: Field[object]) -> object:
    """What a field is where it is not given; MISSING where it must be."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def last(key: str) -> str:
    """The last word of a dotted key."""
    return key.rpartition(".")[2]
