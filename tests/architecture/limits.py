"""The checkers behind the limits of the architecture. Each takes a parsed file and returns what breaks its rule.

They read syntax only and import nothing of what they check. test_checkers.py shows that each of them can fail.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 6
MAX_ALGORITHM_CODE_LINES = 120

DICTATED_SIGNATURES = {
    ("hybridflow/models/attention.py", "attend"): "transformers calls attention functions with these arguments",
    ("hybridflow/rollout/slot_cache.py", "_attention"): "transformers calls attention functions with these arguments",
    ("hybridflow/rewards/code.py", "compute_score"): "reward.options are keyword arguments, by whose names they are checked",
    ("hybridflow/rewards/http.py", "compute_score"): "reward.options are keyword arguments, by whose names they are checked",
    ("hybridflow/rewards/judge.py", "compute_score"): "reward.options are keyword arguments, by whose names they are checked",
}
"""Functions whose many parameters another package prescribes, and which one."""

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
DefinitionNode = FunctionNode | ast.ClassDef


@dataclass(frozen=True)
class Source:
    """A Python file as the checkers see it."""

    path: str
    """Relative to the root of the repository, with forward slashes."""
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @property
    def num_lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> Iterator[FunctionNode]:
        return (node for node in ast.walk(self.tree) if isinstance(node, FunctionNode))


@dataclass(frozen=True)
class Violation:
    """One broken rule."""

    path: str
    line: int
    problem: str
    """What was found and what is allowed."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.problem}"


def sources(*folders: str) -> list[Source]:
    """The Python files below `folders` of the repository, sorted."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)
    return [Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def report(violations: Iterable[Violation]) -> str:
    """All violations, one per line, under a heading for pytest's output."""
    return "\n".join(["", *map(str, violations)])


def long_files(source: Source, *, allowed: int = MAX_FILE_LINES) -> list[Violation]:
    """The file, where it has too many lines."""
    if source.num_lines <= allowed:
        return []
    return [Violation(source.path, source.num_lines, f"the file has {source.num_lines} lines, allowed {allowed}")]


def long_functions(source: Source) -> list[Violation]:
    """Functions with too many lines, signature and docstring included, decorators not."""
    found = []
    for node in source.functions():
        assert node.end_lineno is not None
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            problem = f"function {node.name!r} has {length} lines, allowed {MAX_FUNCTION_LINES}"
            found.append(Violation(source.path, node.lineno, problem))
    return found


def many_parameters(source: Source) -> list[Violation]:
    """Functions with too many parameters, `self` and `cls` not counted."""
    found = []
    for node in source.functions():
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = [argument.arg for argument in every if argument.arg not in ("self", "cls")]
        if len(names) > MAX_PARAMETERS and (source.path, node.name) not in DICTATED_SIGNATURES:
            problem = f"function {node.name!r} has {len(names)} parameters, allowed {MAX_PARAMETERS}: use a dataclass"
            found.append(Violation(source.path, node.lineno, problem))
    return found


def code_lines(source: Source) -> int:
    """Lines that hold code: neither blank nor part of a comment or a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def long_algorithms(source: Source) -> list[Violation]:
    """The file, where it holds more code than one page. Explanations are not counted, so that nobody saves on them."""
    found = code_lines(source)
    if found <= MAX_ALGORITHM_CODE_LINES:
        return []
    problem = (
        f"the algorithm has {found} lines of code, allowed {MAX_ALGORITHM_CODE_LINES} (docstrings and comments not counted)"
    )
    return [Violation(source.path, 1, problem)]


def imported_modules(source: Source) -> list[tuple[int, str]]:
    """Line and dotted name of everything imported, anywhere in the file: in functions and under TYPE_CHECKING too.

    `from hybridflow import ops` gives `hybridflow.ops`; a relative import is resolved against the file's package.
    """
    package = source.path.removesuffix(".py").split("/")[:-1]
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def part_of(module: str) -> str | None:
    """`ops` for `hybridflow.ops.losses`; None for what is not in the package."""
    names = module.split(".")
    return names[1] if names[0] == "hybridflow" and len(names) > 1 else None


def upward_imports(source: Source, levels: Sequence[Sequence[str]]) -> list[Violation]:
    """Imports of a part that stands above the file's own part. `levels` go from what all may import to what none may."""
    height = {part: level for level, parts in enumerate(levels) for part in parts}
    own = source.path.removeprefix("hybridflow/").split("/")[0].removesuffix(".py")
    if own not in height:
        return [Violation(source.path, 1, f"part {own!r} has no place in the levels of test_imports.py")]
    found = []
    for line, module in imported_modules(source):
        part = part_of(module)
        if part in height and height[part] > height[own]:
            problem = f"{own!r} imports {module!r}, which stands above it; allowed are {own!r} and what comes before"
            found.append(Violation(source.path, line, problem))
    return found


def part_cycle(files: Sequence[Source]) -> list[str]:
    """The parts of a circle of imports, first and last the same, or an empty list."""
    edges: dict[str, set[str]] = {}
    for source in files:
        own = source.path.removeprefix("hybridflow/").split("/")[0].removesuffix(".py")
        used = {part for _, module in imported_modules(source) if (part := part_of(module)) is not None}
        edges.setdefault(own, set()).update(used - {own})
    finished: set[str] = set()

    def visit(part: str, path: list[str]) -> list[str]:
        if part in path:
            return [*path[path.index(part) :], part]
        if part in finished:
            return []
        for used in sorted(edges.get(part, ())):
            if cycle := visit(used, [*path, part]):
                return cycle
        finished.add(part)
        return []

    return next((cycle for part in sorted(edges) if (cycle := visit(part, []))), [])


def strayed_imports(source: Source, homes: Mapping[str, Sequence[str]]) -> list[Violation]:
    """Imports of a package outside its home. `homes` maps packages to path prefixes below hybridflow/."""
    place = source.path.removeprefix("hybridflow/")
    found = []
    for line, module in imported_modules(source):
        home = next((homes[package] for package in homes if f"{module}.".startswith(f"{package}.")), None)
        if home is not None and not place.startswith(tuple(home)):
            found.append(Violation(source.path, line, f"imports {module!r}, allowed only in {' and '.join(home)}"))
    return found


def printed(source: Source) -> list[Violation]:
    """Calls of print."""
    calls = (node for node in ast.walk(source.tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
    lines = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    return [
        Violation(source.path, line, "calls print, allowed nowhere in the package: use a tracker or an error") for line in lines
    ]


BARE_TODO = re.compile(r"\b(?:TODO|FIXME|XXX)\b(?!\(#\d+\))")


def bare_todos(source: Source) -> list[Violation]:
    """Comments that put something off without naming an issue, as `TODO(#12)` would."""
    return [
        Violation(source.path, token.start[0], f"found {token.string.strip()!r}, allowed only with an issue: TODO(#12)")
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline)
        if token.type == tokenize.COMMENT and BARE_TODO.search(token.string)
    ]


def forbidden_words(path: str, text: str, words: Mapping[str, Sequence[str]]) -> list[Violation]:
    """Lines with a forbidden word. `words` maps a regular expression to the folders that may hold it."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word, folders in words.items():
            if (match := re.search(word, line)) and not path.startswith(tuple(folders)):
                where = f"only in {', '.join(folders)}" if folders else "nowhere"
                found.append(Violation(path, number, f"found {match.group()!r}, allowed {where}"))
    return found


def public_definitions(source: Source) -> Iterator[tuple[str, DefinitionNode]]:
    """Public functions and classes of the module, and public methods of its public classes, with their dotted names."""
    for node in source.tree.body:
        if isinstance(node, DefinitionNode) and not node.name.startswith("_"):
            yield node.name, node
            methods = node.body if isinstance(node, ast.ClassDef) else []
            for method in methods:
                if isinstance(method, FunctionNode) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def explained_methods(files: Iterable[Source]) -> set[str]:
    """Names of methods that some class explains: an implementation of the same name need not repeat it."""
    named = (pair for source in files for pair in public_definitions(source))
    return {node.name for name, node in named if "." in name and ast.get_docstring(node)}


def missing_docstrings(source: Source, explained: set[str]) -> list[Violation]:
    """The module and its public definitions that lack a docstring.

    Methods named in `explained` may do without, and so may properties: a property is named like the value that it is.
    """
    found = [] if ast.get_docstring(source.tree) else [Violation(source.path, 1, "the module has no docstring")]
    for name, node in public_definitions(source):
        is_exempt = any(ast.unparse(mark).endswith(("overload", "property", ".setter")) for mark in node.decorator_list)
        is_explained = "." in name and node.name in explained
        if not ast.get_docstring(node) and not is_exempt and not is_explained:
            found.append(Violation(source.path, node.lineno, f"{name} has no docstring; everything public has one"))
    return found


CHOICES = {"algorithm.name": ("algorithms/",), "engine": ("rollout/",), "role": ("controller/placement.py",)}
"""What must not be told apart by name, and where it may."""


def branches_on_names(source: Source) -> list[Violation]:
    """Comparisons of an algorithm, an engine or a role with a string, outside the folder that may know their names."""
    place = source.path.removeprefix("hybridflow/")
    found = []
    for node in ast.walk(source.tree):
        for subject in _subjects_compared_with_strings(node):
            for choice, homes in CHOICES.items():
                if f".{ast.unparse(subject)}".endswith(f".{choice}") and not place.startswith(homes):
                    problem = f"compares {ast.unparse(subject)!r} with a name, allowed only in {', '.join(homes)}"
                    found.append(Violation(source.path, subject.lineno, problem))
    return found


def _subjects_compared_with_strings(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        return [side for side in sides if not _is_text(side)] if any(map(_is_text, sides)) else []
    if isinstance(node, ast.Match):
        patterns = [part for case in node.cases for part in ast.walk(case.pattern)]
        return [node.subject] if any(isinstance(part, ast.MatchValue) and _is_text(part.value) for part in patterns) else []
    return []


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return any(map(_is_text, node.elts))
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def unexplained_fields(source: Source, class_name: str) -> list[Violation]:
    """Fields of a dataclass that no string under them explains."""
    (node,) = [node for node in source.tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    found = []
    for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
        is_explained = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(statement, ast.AnnAssign) and not is_explained:
            name = ast.unparse(statement.target)
            found.append(
                Violation(source.path, statement.lineno, f"{class_name}.{name} has no string under it that explains it")
            )
    return found


def lines_of(folder: str) -> int:
    """Lines of all Python files below a folder of the repository, or of one file."""
    path = ROOT / folder
    files = [path] if path.is_file() else [file for file in path.rglob("*.py") if "__pycache__" not in file.parts]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
