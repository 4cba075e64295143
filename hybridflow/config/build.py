"""From a plain tree of values to frozen dataclasses, collecting every mistake on the way."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from hybridflow.config.ranges import Range
from hybridflow.config.schema import RENAMED
from hybridflow.errors import FieldError
from hybridflow.registry import nearest

T = TypeVar("T")

NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null", object: "any value"}


class UnfitError(ValueError):
    """A value does not fit the type of its key."""


class Builder:
    """Builds dataclasses; `errors` grows instead of an exception being raised at the first.

    `place_of` answers where a key was given; `known_keys`, and `aliases` with what they stand for, are what a misspelt key is
    compared with.
    """

    def __init__(self, place_of: Callable[[str], str], known_keys: Iterable[str], aliases: Mapping[str, str] | None = None):
        self.place_of = place_of
        self.known_keys, self.aliases = list(known_keys), aliases or {}
        self.errors: list[FieldError] = []

    def build(self, kind: type[T], values: object, *, path: str = "", default: T | None = None) -> T | None:
        """An instance of dataclass `kind` with `values` over those of `default`.

        A value that does not fit is answered with a mistake and its default. None where a key without default is not given.
        """
        if not isinstance(values, Mapping):
            if values is not None:  # a section whose keys are all commented out reads as null
                self.add(path, f"found {found(values)}; this is a section with keys of its own")
            values = {}
        hints = get_type_hints(kind, include_extras=True)
        for name, value in values.items():
            if name not in hints:
                self._unknown(_join(path, name), value)
        given: dict[str, object] = {}
        for field in fields(kind):  # type: ignore[arg-type]
            key = _join(path, field.name)
            below = default_of(field) if default is None else vars(default)[field.name]
            if field.name in values:
                given |= self._field(key, hints[field.name], values[field.name], below)
            elif below is MISSING:
                self.add(key, f"is missing; needed: {wanted(hints[field.name])}")
                return None
        return self._instance(kind, given, path, default)

    def add(self, key: str, problem: str) -> None:
        """Note a mistake at `key`."""
        self.errors.append(FieldError(key, problem, self.place_of(key)))

    def _unknown(self, key: str, value: object) -> None:
        if isinstance(value, Mapping) and value:
            for name, element in value.items():
                self._unknown(_join(key, name), element)
        elif key in RENAMED:
            self.add(key, f"is called {RENAMED[key]} now")
        else:
            self.add(key, f"no such key{suggestion(key, self.known_keys, self.aliases)}")

    def _field(self, key: str, hint: object, value: object, default: object) -> dict[str, object]:
        name = _last(key)
        if isinstance(hint, type) and is_dataclass(hint):
            built = self.build(hint, value, path=key, default=None if default is MISSING else default)
            return {name: built} if built is not None else {}
        if get_origin(hint) is Mapping and isinstance(value, Mapping):
            return {name: self._mapping(key, get_args(hint)[1], value)}
        try:
            return {name: convert(value, hint)}
        except UnfitError as error:
            self.add(key, str(error))
            # Whoever meant other entries than the default's must not be told what is wrong with those.
            return {name: {}} if get_origin(hint) is Mapping else {}

    def _mapping(self, key: str, hint: object, value: Mapping[object, object]) -> dict[str, object]:
        """The entries of a mapping. One that does not fit stays as text: other keys may refer to it by its name."""
        entries: dict[str, object] = {}
        for name, element in value.items():
            try:
                entries[str(name)] = convert(element, hint)
            except UnfitError as error:
                self.add(_join(key, name), str(error))
                entries[str(name)] = str(element)
        return entries

    def _instance(self, kind: type[T], given: dict[str, Any], path: str, default: T | None) -> T | None:
        try:
            return kind(**given) if default is None else replace(default, **given)  # type: ignore[type-var]
        except ValueError as error:  # raised by a check of the dataclass itself
            self.add(path, str(error))
            return default
        except TypeError as error:  # a key without default had a mistake, which is noted already
            if not self.errors:
                raise TypeError(f"{kind.__qualname__} cannot be built from {sorted(given)}") from error
            return default


def convert(value: object, hint: object) -> object:
    """`value` as type `hint`.

    Lossless readings only: an integer is a number, text such as 1e-6 too, a scalar is a tuple of one.

    Raises:
        UnfitError: it is not of that type; the message says what was found and what is needed.
    """
    origin = get_origin(hint)
    if origin is Annotated:
        return _convert_annotated(value, hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint)
    if origin is Literal:
        return _convert_literal(value, hint)
    if origin is tuple:
        return _convert_tuple(value, hint)
    if origin in (Mapping, dict):
        return _convert_mapping(value, hint)
    return _convert_scalar(value, hint)


def _convert_annotated(value: object, hint: object) -> object:
    """A number with the range that it must be in, or a path."""
    kind, note = get_args(hint)
    converted = convert(value, kind)
    if isinstance(note, Range):
        assert isinstance(converted, int | float), f"a range is for numbers, not for {kind}"
        if converted not in note:
            raise _unfit(value, hint)
        return converted
    return str(Path(str(converted)).expanduser()) if str(converted).startswith("~") else converted


def _convert_scalar(value: object, hint: object) -> object:
    if hint is object:
        return value
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise _unfit(value, hint) from error
    if not isinstance(hint, type) or not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _unfit(value, hint)
    return value


def _convert_union(value: object, hint: object) -> object:
    for member in get_args(hint):
        try:
            return convert(value, member)
        except UnfitError:
            continue
    raise _unfit(value, hint)


def _convert_literal(value: object, hint: object) -> object:
    allowed = get_args(hint)
    for choice in allowed:
        if value == choice and type(value) is type(choice):
            return choice
    raise UnfitError(f"found {found(value)}; allowed: {_listed(allowed)}{nearest(str(value), map(str, allowed))}")


def _convert_tuple(value: object, hint: object) -> object:
    members = get_args(hint)
    is_any_length = len(members) == 2 and members[1] is Ellipsis
    if value is None or isinstance(value, Mapping):
        raise _unfit(value, hint)
    elements = list(value) if isinstance(value, list | tuple) else [value]
    if not is_any_length and len(elements) != len(members):
        raise _unfit(value, hint)
    element_hints = [members[0]] * len(elements) if is_any_length else members
    try:
        return tuple(convert(element, element_hint) for element, element_hint in zip(elements, element_hints, strict=True))
    except UnfitError as error:
        raise _unfit(value, hint) from error


def _convert_mapping(value: object, hint: object) -> object:
    if not isinstance(value, Mapping):
        raise _unfit(value, hint)
    _, element_hint = get_args(hint)
    try:
        return {str(name): convert(element, element_hint) for name, element in value.items()}
    except UnfitError as error:
        raise _unfit(value, hint) from error


def _unfit(value: object, hint: object) -> UnfitError:
    is_quotable = wanted(hint).startswith("text") and isinstance(value, int | float)
    advice = ". Quote it to have it read as text" if is_quotable else ""
    return UnfitError(f"found {found(value)}; needed: {wanted(hint)}{advice}")


def found(value: object) -> str:
    """A value with the kind of thing it is, for messages."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "true/false", int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}
    kind = kinds.get(type(value), type(value).__name__)
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return f"{text} ({kind})"


def wanted(hint: object) -> str:
    """What type `hint` allows, in words."""
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{wanted(members[0])} of {members[1]}" if isinstance(members[1], Range) else wanted(members[0])
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(member) for member in members)
    if origin is Literal:
        return f"one of {_listed(members)}" if len(members) > 1 else str(members[0])
    if origin is tuple and members[-1] is Ellipsis:
        return f"a list, each element {wanted(members[0])}"
    if origin is tuple:
        return f"a list of {len(members)} ({', '.join(wanted(member) for member in members)})"
    if origin in (Mapping, dict):
        return f"a mapping from names to {wanted(members[1])}"
    return NAMES.get(hint, str(hint)) if isinstance(hint, type) else str(hint)


def suggestion(key: str, known_keys: Iterable[str], aliases: Mapping[str, str]) -> str:
    """`; did you mean 'section.name'?` for the nearest known key: in its own section, else anywhere, else by its last word.

    A bare last word is answered with every key that ends in it. `aliases` are compared too, where they are very near.
    """
    known = list(known_keys)
    if "." not in key and (words := _keys_ending_in(key, known, aliases)):
        return f"; did you mean {' or '.join(map(repr, words))}?"
    if words := difflib.get_close_matches(key, [*known, *aliases], 1, 0.9):
        return f"; did you mean {words[0]!r}?"
    section, _, name = key.rpartition(".")
    siblings = {_last(other): other for other in known if other.rpartition(".")[0] == section}
    by_name = {_last(other): other for other in reversed(known)}
    for asked, candidates, cutoff in ((name, siblings, 0.6), (key, {k: k for k in known}, 0.75), (name, by_name, 0.75)):
        if words := difflib.get_close_matches(asked, candidates, 1, cutoff):
            return f"; did you mean {candidates[words[0]]!r}?"
    if siblings:
        return f". Keys of this section: {', '.join(siblings)}"
    return f". Sections: {', '.join(dict.fromkeys(other.partition('.')[0] for other in known))}"


def _keys_ending_in(word: str, known: Iterable[str], aliases: Mapping[str, str]) -> list[str]:
    """Those known keys whose last word it is; else what the aliases stand for that end in it."""
    exact = [key for key in known if _last(key) == word]
    return exact or list(dict.fromkeys(ours for alias, ours in aliases.items() if ours and _last(alias) == word))


def keys_of(kind: type, path: str = "") -> list[str]:
    """The dotted keys of dataclass `kind` and the dataclasses in it, in the order of their fields."""
    hints = get_type_hints(kind)
    keys = []
    for field in fields(kind):
        hint, key = hints[field.name], _join(path, field.name)
        keys += keys_of(hint, key) if isinstance(hint, type) and is_dataclass(hint) else [key]
    return keys


def default_of(field: Field[object]) -> object:
    """What a field is where it is not given; MISSING where it must be."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)
