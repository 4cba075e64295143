"""Rules about environments. Their source is read, and nothing of it is executed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hybridflow.config.rules_files import missing
from hybridflow.config.schema import Config
from hybridflow.config.user_code import import_errors, name_errors, parsed, top_level_names
from hybridflow.errors import FieldError
from hybridflow.registry import nearest

TOOL_FORMATS = ("auto", "hermes", "llama3", "mistral")


def environment_can_be_found(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The user's file is there and parses, and has the class; only one of file and name is given."""
    environment = config.environment
    if environment.path is None:
        if environment.class_name is not None:
            problem = f"found {environment.class_name!r}, but environment.path is not set. Name the file of the class there"
            yield FieldError("environment.class_name", problem, related=("environment.path",))
        return
    if environment.name is not None:
        problem = f"found {environment.name!r} beside environment.path={environment.path!r}. Leave out one of them"
        yield FieldError("environment.name", problem, related=("environment.path",))
    if not os.path.isfile(environment.path):
        yield FieldError("environment.path", missing(environment.path, "file"), is_local=True)
        return
    if environment.class_name is not None:
        file_key = "environment.path"
        yield from name_errors("environment.class_name", Path(environment.path), environment.class_name, file_key=file_key)
        return
    try:
        names = list(top_level_names(parsed(Path(environment.path))))
    except ValueError as error:
        yield FieldError("environment.path", str(error))
        return
    if not names:
        problem = f"{environment.path} defines no class with reset and step, and no agent's run(row, address)"
        yield FieldError("environment.path", problem)
    yield from import_errors("environment.path", Path(environment.path))


def episodes_can_be_generated(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The algorithm generates, and calls of tools can be read."""
    environment = config.environment
    if environment.tool_format not in TOOL_FORMATS:
        near = nearest(environment.tool_format, TOOL_FORMATS) or "."
        problem = f"{environment.tool_format!r} is not known{near} Known: {', '.join(TOOL_FORMATS)}"
        yield FieldError("environment.tool_format", problem)
    if not environment.is_set:
        return
    if "rollout" not in roles:
        problem = f"{config.algorithm.name} generates nothing, so that an environment has nothing to answer. Leave it out"
        key = "environment.path" if environment.path is not None else "environment.name"
        yield FieldError(key, problem, related=("algorithm.name",))
