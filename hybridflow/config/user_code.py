"""What can be said of a Python file of the user's before anything starts. Its source is read, and nothing of it is executed."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from hybridflow.errors import FieldError
from hybridflow.registry import nearest


def name_errors(key: str, file: Path, name: str, *, file_key: str = "", given: tuple[str, ...] = ()) -> Iterator[FieldError]:
    """Why `file.py:name` cannot be had: no such file, no such name in it, or imports that will fail. `file_key` names the file
    where `key` names the name alone; packages in `given` are there when it is imported."""
    file_key, file = file_key or key, file.expanduser()
    if not file.is_file():
        yield FieldError(file_key, f"there is no file {str(file)!r} here", is_local=True)
        return
    try:
        names = list(top_level_names(parsed(file)))
    except ValueError as error:
        yield FieldError(file_key, str(error))
        return
    if "*" not in names and name not in names:
        defined = f" It defines: {', '.join(names)}" if names else ""
        related = (file_key,) if file_key != key else ()
        yield FieldError(key, f"{file} has no {name!r}{nearest(name, names) or '.'}{defined}", related=related)
    yield from import_errors(file_key, file, given=given)


def parsed(file: Path) -> ast.Module:
    """The file as a tree.

    Raises:
        ValueError: it is not Python.
    """
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{file} is not Python: {error}") from error


def top_level_names(tree: ast.Module) -> Iterator[str]:
    """What the module defines; `*` where that depends on how it runs."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            yield "*"  # what such a block defines depends on where it runs


def import_errors(key: str, file: Path, *, given: tuple[str, ...] = ()) -> Iterator[FieldError]:
    """Imports of the file, and of files beside it that it imports by dots, which find nothing: told once each."""
    waiting, seen = [file.resolve()], set[Path]()
    while waiting:
        current = waiting.pop()
        if current in seen or not current.is_file():
            continue
        seen.add(current)
        try:
            tree = parsed(current)
        except ValueError as error:
            yield FieldError(key, str(error))
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                found, missing = _relative(current, node)
                waiting += found
                for name in missing:
                    problem = f"{current}, line {node.lineno}, imports {name!r}, and there is no {missing[name]}.py"
                    yield FieldError(key, f"{problem}. Put it there, or import it by a name that is on the Python path")
        for line, top in _absolute(tree):
            if top not in given and not can_be_found(top, [file.resolve().parent, current.parent]):
                problem = f"{current}, line {line}, imports {top!r}, which is neither beside it nor installed"
                yield FieldError(key, f"{problem}. Install it, or put {top}.py beside {file.name}", is_local=True)


def _relative(file: Path, node: ast.ImportFrom) -> tuple[list[Path], dict[str, Path]]:
    """The files that `from .x import y` means, and what is missing: the name with the place where it is looked for."""
    parents = file.parents
    base = parents[min(node.level, len(parents)) - 1]
    if node.module:
        wanted = {"." * node.level + node.module: base.joinpath(*node.module.split("."))}
    elif (base / "__init__.py").is_file():
        return [base / "__init__.py"], {}  # it may define what is asked for
    else:
        wanted = {"." * node.level + alias.name: base / alias.name for alias in node.names}
    missing = {name: place for name, place in wanted.items() if not (place.is_dir() or place.with_suffix(".py").is_file())}
    return [place.with_suffix(".py") for name, place in wanted.items() if name not in missing], missing


def _absolute(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and top package of each import that is executed whenever the module is; none where it changes where is looked."""
    if "sys.path" in ast.unparse(tree):
        return
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def can_be_found(package: str, folders: list[Path]) -> bool:
    """Whether a top package is in one of the folders, or installed."""
    if package in sys.modules or any((folder / package).is_dir() or (folder / f"{package}.py").is_file() for folder in folders):
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
