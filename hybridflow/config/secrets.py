"""Values that come from the environment stay references in whatever is written: keys of services do not reach files in
clear."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any

from hybridflow.config.schema import Config
from hybridflow.config.tree import with_texts

REFERENCE = re.compile(r"\$\{\s*oc\.env:\s*([^,}\s]+)")
SHORTEST = 4
"""Characters of a value that is looked for within others; shorter ones are references only where they are all of a text."""


class FromEnvironment(str):
    """A text with values of environment variables in it."""

    written: str = ""
    """As it is in files: `Bearer ${oc.env:KEY}`."""


def referred(values: Iterable[object]) -> dict[str, str]:
    """The variables that values of a configuration refer to, as given, with what they hold.

    Example: `referred(["Bearer ${oc.env:KEY}"])` is `{"KEY": "abc"}` where that is what KEY holds.
    """
    names = {name for value in values for name in REFERENCE.findall(str(value))}
    return {name: os.environ[name] for name in sorted(names) if os.environ.get(name)}


def with_references(config: Config, variables: Mapping[str, str]) -> Config:
    """`config`, in whose options (those of the algorithm, and every mapping, such as `reward.options`) texts know what of
    them came from `variables`."""
    if not variables:
        return config
    sections = {}
    for field in fields(config):
        section: Any = getattr(config, field.name)
        found = {key: value for key, value in vars(section).items() if isinstance(value, Mapping) or is_dataclass(value)}
        sections[field.name] = replace(section, **{key: _marked(value, variables) for key, value in found.items()})
    return replace(config, **sections)


def as_written(config: Config) -> dict[str, Any]:
    """`config` as nested dicts, for files and for services: what came from the environment is a reference."""
    return {key: with_texts(value, written) for key, value in asdict(config).items()}


def written(text: str) -> str:
    """A text of a configuration as it is in files."""
    return text.written if isinstance(text, FromEnvironment) else text


def _marked(value: Any, variables: Mapping[str, str]) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return replace(value, **{name: _marked(element, variables) for name, element in held.items()})
    return with_texts(value, lambda text: _text(text, variables))


def _text(value: str, variables: Mapping[str, str]) -> str:
    names = {held: f"${{oc.env:{name}}}" for name, held in variables.items() if held == value or len(held) >= SHORTEST}
    if not any(held in value for held in names):
        return value
    longest_first = "|".join(re.escape(held) for held in sorted(names, key=len, reverse=True))
    parts = re.split(f"({longest_first})", value)
    marked = FromEnvironment(value)
    marked.written = "".join(names[part] if place % 2 else part.replace("${", "\\${") for place, part in enumerate(parts))
    return marked
