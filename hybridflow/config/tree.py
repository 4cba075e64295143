"""Keys with their values, and trees of them by dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Setting:
    """One key with its value, as given."""

    key: str
    value: object
    place: str
    """`file:line` or `command line`."""


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
