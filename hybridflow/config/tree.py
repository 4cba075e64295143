"""Keys with their values, and trees of them by dotted names."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One key with its value, as given."""

    key: str
    value: object
    place: str
    """`file:line` or `command line`."""


def join(path: str, name: object) -> str:
    """`path.name`, or `name` where there is no path."""
    return f"{path}.{name}" if path else str(name)


def leaves(tree: Mapping[Any, object], path: str = "", *, whole: Container[str] = ()) -> Iterator[tuple[str, object]]:
    """What a tree holds, by dotted keys; a section that is empty or one of `whole` is a value itself.

    Example:
        >>> dict(leaves({"actor": {"learning_rate": 1e-6}, "reward": {"options": {"x": 1}}}, whole=["reward.options"]))
        {'actor.learning_rate': 1e-06, 'reward.options': {'x': 1}}
    """
    for name, value in tree.items():
        key = join(path, name)
        if isinstance(value, Mapping) and value and key not in whole:
            yield from leaves(value, key, whole=whole)
        else:
            yield key, value


def with_texts(value: Any, change: Callable[[str], object]) -> Any:
    """`value` with each text in its sections and lists replaced by what `change` makes of it.

    Example:
        >>> with_texts({"stop": ["a", "b"], "seed": 1}, str.upper)
        {'stop': ['A', 'B'], 'seed': 1}
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_texts(element, change) for key, element in value.items()}
    return type(value)(with_texts(element, change) for element in value) if isinstance(value, list | tuple) else value


def insert(tree: dict[str, object], key: str, value: object) -> bool:
    """Set the dotted `key`; False where something on the way is not a section.

    Example:
        >>> tree = {}
        >>> insert(tree, "actor.learning_rate", 1e-6), insert(tree, "actor.learning_rate.x", 1), tree
        (True, False, {'actor': {'learning_rate': 1e-06}})
    """
    *sections, name = key.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            return False
        tree = child
    tree[name] = value
    return True


def lookup(tree: Mapping[str, object], key: str) -> object:
    """What stands at the dotted `key`; None where nothing does.

    Example:
        >>> lookup({"actor": {"learning_rate": 1e-6}}, "actor.learning_rate")
        1e-06
    """
    value: object = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def merged(under: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """Two trees as one; `over` wins."""
    both = {**under, **over}
    for key in under.keys() & over.keys():
        below, above = under[key], over[key]
        if isinstance(below, Mapping) and isinstance(above, Mapping):
            both[key] = merged(below, above)
    return both
