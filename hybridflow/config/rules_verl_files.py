"""Rules about verl's files of tools and interactions: what they name is looked for, and nothing of it is executed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from hybridflow.config.rules_files import missing
from hybridflow.config.schema import Config
from hybridflow.config.user_code import can_be_found, name_errors
from hybridflow.errors import FieldError
from hybridflow.user_file import split_name

SECTIONS = {"tool_config_path": "tools", "interaction_config_path": "interaction"}
METHODS = {"tools": "create, execute, release", "interaction": "start_interaction, generate_response"}
BUILT_IN = ("verl.tools.gsm8k_tool.Gsm8kTool", "verl.interactions.gsm8k_interaction.Gsm8kInteraction")
"""Classes of verl's that are here too."""


def verls_files_can_be_used(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The YAML files are there and have their section, and each class that they name can be found."""
    if not (config.environment.name or "").endswith(":VerlEpisode"):
        return
    for option, section in SECTIONS.items():
        if (path := config.environment.options.get(option)) is None:
            continue
        key = f"environment.options.{option}"
        if not os.path.isfile(str(path)):  # False too where this user may not look
            advice = "Copy it from the folder that the script was written for, or set the path"
            yield FieldError(key, f"{missing(str(path), 'file')}. {advice}", is_local=True)
            continue
        try:
            found = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            told = str(error).replace("\n", " ")
            yield FieldError(key, f"{path} cannot be read as YAML: {told}", is_local=isinstance(error, OSError))
            continue
        entries = found.get(section) if isinstance(found, Mapping) else None
        if not isinstance(entries, list) or not entries:
            yield FieldError(key, f"{path} has no list `{section}`. Write one, with class_name and config in each entry")
            continue
        for entry in entries:
            yield from _entry_errors(key, str(path), section, entry)


def _entry_errors(key: str, path: str, section: str, entry: object) -> Iterator[FieldError]:
    named = entry.get("class_name") if isinstance(entry, Mapping) else None
    if not isinstance(named, str) or "." not in named or (split_name(named) is None and not all(named.split("."))):
        found = "without class_name" if named is None else f"of class_name {named!r}"
        yield FieldError(key, f"{path}: {section} has an entry {found}. Name one as my_package.module.Class")
        return
    assert isinstance(entry, Mapping)
    config = entry.get("config") or {}
    kind = config.get("type", "native") if isinstance(config, Mapping) else "native"
    if kind != "native":
        problem = f"{path}: {named} is of type {kind!r}, whose tools come from a server"
        yield FieldError(key, f"{problem}. Write a tool of type native that calls it")
    elif (parts := split_name(named)) is not None:
        yield from name_errors(key, Path(parts[0]), parts[1], given=("verl",))
    elif named not in BUILT_IN and not _can_be_found(named.split(".")):
        of_verl = "verl is not installed, and this class of its is not here" if named.startswith("verl.") else "it is not found"
        advice = f"Write a class with {METHODS[section]} and name it as path/to/file.py:Class (docs/environments.md)"
        yield FieldError(key, f"{path}: class_name {named!r}: {of_verl}. {advice}", is_local=True)


def _can_be_found(parts: list[str]) -> bool:
    """Whether the module is below this folder, or its top package is installed."""
    module = Path(*parts[:-1])
    return module.with_suffix(".py").is_file() or (module / "__init__.py").is_file() or can_be_found(parts[0], [])
