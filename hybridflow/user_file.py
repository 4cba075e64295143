"""Python files of the user's: how one is imported by its path, and what `path/to/file.py:Name` means.

The folder of the file comes first where its imports are looked up, as that of a script does: a `utils.py` beside the file is
the one that it means, whatever the working folder holds. Relative imports work, also where no folder has an `__init__.py`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from zlib import crc32

from hybridflow.errors import UserFileError

INSTALLED = tuple(str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("stdlib", "purelib", "platlib"))
OWN_PACKAGE = __name__.partition(".")[0]


def split_name(name: str) -> tuple[str, str] | None:
    """File and attribute of `path/to/file.py:Name`; None where `name` is of another form, such as `my_package.module:Name`.

    Example:
        >>> split_name("rewards/mine.py:Judge")
        ('rewards/mine.py', 'Judge')
    """
    file, colon, attribute = name.rpartition(":")
    return (file, attribute) if colon and file.endswith(".py") else None


def import_file(path: str) -> ModuleType:
    """The module in the file, imported once for each content: its name is made from path and content, so that other processes
    which have imported the same file can unpickle its classes.

    Raises:
        UserFileError: there is no such file, or it does not import. The message does not say which file was asked for.
    """
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, siblings, n=1)
        raise UserFileError("there is no such file" + (f"; did you mean {near[0]!r}?" if near else ""))
    if file.suffix != ".py":
        raise UserFileError("is not a Python file; its name must end in .py")
    source = file.read_bytes()
    try:
        level = max((node.level for node in _relative_imports(ast.parse(source))), default=0)
    except (SyntaxError, ValueError) as error:
        raise UserFileError(f"the file does not import: {type(error).__name__}: {error}") from error
    package, parents = _packages(file, level)
    name = ".".join([f"hybridflow_user_{crc32(str(package).encode() + source):08x}", *parents, file.stem])
    if name in sys.modules:
        return sys.modules[name]
    _put_first(file.parent)
    try:
        return _import(file, name, package if level else None)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise UserFileError(f"the file does not import: {type(error).__name__}: {error}") from error


def _relative_imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level)


def _packages(file: Path, level: int) -> tuple[Path, list[str]]:
    """The folder that stands as the top package, and the names of those between it and the file. Without relative imports none
    is needed, and no `__init__.py` is run."""
    top, names = file.parent, list[str]()
    while level and top != top.parent and (len(names) < level - 1 or (top / "__init__.py").is_file()):
        top, names = top.parent, [top.name, *names]
    return top, names


def _put_first(folder: Path) -> None:
    """What lies in the folder is found before all else, and what was imported from elsewhere under the same names, installed
    packages aside, is forgotten."""
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    for name in {entry.stem for entry in folder.glob("*.py")} | {entry.parent.name for entry in folder.glob("*/*.py")}:
        found = getattr(sys.modules.get(name), "__file__", None)
        if found is None or name == OWN_PACKAGE or str(Path(found).resolve()).startswith((*INSTALLED, str(folder))):
            continue
        for loaded in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
            del sys.modules[loaded]


def _import(file: Path, name: str, package: Path | None) -> ModuleType:
    if package is not None:
        top = ModuleType(name.partition(".")[0], f"Stands for the folder {package}.")
        top.__path__ = [str(package)]
        sys.modules[top.__name__] = top
        return importlib.import_module(name)
    parent = name.rpartition(".")[0]
    sys.modules.setdefault(parent, ModuleType(parent))  # pickle imports it before the module
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, f"{file} ends in .py"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    spec.loader.exec_module(module)
    return module
