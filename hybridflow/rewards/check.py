"""Mistakes in `reward.path` and `reward.function` that can be told without running the file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from hybridflow.config.schema import RewardConfig
from hybridflow.errors import Mistake
from hybridflow.registry import nearest


def reward_mistakes(config: RewardConfig) -> list[Mistake]:
    """Why the user's file cannot be used: no such file, not Python, or no such function in it. Imports nothing of it."""
    if config.path is None:
        return []
    file = Path(config.path).expanduser()
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        return [Mistake("reward.path", f"there is no file {config.path!r}{nearest(file.name, siblings)}")]
    try:
        module = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        return [Mistake("reward.path", f"{config.path!r} is not Python: {error}")]
    names = list(_top_level_names(module.body))
    if config.function in names or "*" in names:
        return []
    defined = ", ".join(names) or "nothing"
    problem = f"{config.path!r} has no {config.function!r}{nearest(config.function, names) or '.'} It defines {defined}"
    return [Mistake("reward.function", problem)]


def _top_level_names(statements: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements bind; `*` for an import of everything."""
    for statement in statements:
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (alias.asname or alias.name for alias in aliases)
            case ast.Assign(targets=targets):
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.If(body=body, orelse=orelse):
                yield from _top_level_names(body + orelse)
            case ast.Try(body=body, handlers=handlers):
                yield from _top_level_names(body + [inner for handler in handlers for inner in handler.body])
