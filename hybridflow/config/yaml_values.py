"""YAML as of version 1.2: text is a number or a truth value only where nothing else can be meant.

By version 1.1, which PyYAML reads, `010` is 8, `12:30` is 750, `2024_01` is 202401 and `no` is false, each in silence.
"""

from __future__ import annotations

import re
from collections.abc import Hashable

import yaml


class Loader(yaml.SafeLoader):
    """Reads plain values by the rules of version 1.2, and refuses a key that is given twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML fills it by class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        """The mapping of `node`.

        Raises:
            yaml.constructor.ConstructorError: a key is there twice.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != MERGE and key.value in seen:
                problem = f"found duplicate key {key.value}"
                raise yaml.constructor.ConstructorError("while reading a mapping", node.start_mark, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


MERGE = "tag:yaml.org,2002:merge"
_NUMBER = r"(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", rf"[-+]?{_NUMBER}|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        rf"[-+]?(?:{_NUMBER}\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?{_NUMBER}[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def read_yaml(text: str) -> object:
    """What `text` says.

    Example:
        >>> read_yaml("[010, 12:30, 2024_01, no, 1e-6, 5]")
        ['010', '12:30', '2024_01', 'no', 1e-06, 5]

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, Loader=Loader)


def read_value(text: str) -> object:
    """What the value of a `key=value` argument says: as in Hydra, a mapping may go without the space behind its colons.

    Example:
        >>> read_value("{a:1,b:{c:x}}"), read_value("[s3://b/x, {d:/y}]")
        ({'a': 1, 'b': {'c': 'x'}}, ['s3://b/x', {'d': '/y'}])

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return _with_values(read_yaml(text))


def _with_values(value: object) -> object:
    """`a:1`, which YAML takes for a key without a value, as a key with one."""
    if isinstance(value, list):
        return [_with_values(element) for element in value]
    if not isinstance(value, dict):
        return value
    found: dict[object, object] = {}
    for key, element in value.items():
        name, colon, rest = key.partition(":") if isinstance(key, str) and element is None else (key, "", "")
        found[name] = read_yaml(rest) if colon and rest else _with_values(element)
    return found
