"""Rules about reward functions. Their source is read, and nothing of it is executed."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
from collections.abc import Iterator
from pathlib import Path

from hybridflow import registry
from hybridflow.config.reward_signature import SignatureError, call_for
from hybridflow.config.rules_files import missing
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError
from hybridflow.registry import nearest


def reward_file_exists(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The user's file is there."""
    if config.reward.path is not None and not os.path.isfile(config.reward.path):
        yield FieldError("reward.path", missing(config.reward.path, "file"), is_local=True)


def reward_function_can_be_called(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The user's file parses and defines the function; this or the built-in rule takes `reward.options`."""
    if config.reward.path is not None and os.path.isfile(config.reward.path):
        yield from _own_function(config, Path(config.reward.path))
    elif config.reward.path is None and config.reward.name in registry.REWARDS:
        module, _, function = registry.REWARDS[config.reward.name].partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, f"{module} has no file"
        yield from _signature_errors(config, "reward.name", ast.parse(Path(spec.origin).read_text(encoding="utf-8")), function)


def _own_function(config: Config, file: Path) -> Iterator[FieldError]:
    name = config.reward.function
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        yield FieldError("reward.path", f"{file} is not Python: {error}")
        return
    names = list(_top_level_names(tree))
    if "*" not in names and name not in names:
        defined = f" It defines: {', '.join(names)}" if names else ""
        problem = f"{file} has no {name!r}{nearest(name, names) or '.'}{defined}"
        yield FieldError("reward.function", problem, related=("reward.path",))
    elif "*" not in names and names.count(name) == 1:
        yield from _signature_errors(config, "reward.function", tree, name)


def _signature_errors(config: Config, key: str, tree: ast.Module, name: str) -> Iterator[FieldError]:
    """Where `name` is a plain function; what a decorator or a call has made is asked when it is loaded."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(functions) != 1 or functions[0].decorator_list:
        return
    try:
        call_for(_parameters(functions[0].args), config.reward.options, is_batch=_is_batch(tree))
    except SignatureError as error:
        asked = config.reward.name if config.reward.path is None else f"{name} of {config.reward.path}"
        where = f"reward.options.{error.option}" if error.option else key
        about = ("reward.options", "reward.name") if config.reward.path is None else ("reward.options", "reward.path")
        yield FieldError(where, f"{asked}: {error}", related=about)


def _parameters(arguments: ast.arguments) -> dict[str, inspect.Parameter]:
    """The parameters of a function, as `inspect.signature` gives them."""
    parameters = [inspect.Parameter(node.arg, inspect.Parameter.POSITIONAL_ONLY) for node in arguments.posonlyargs]
    parameters += [inspect.Parameter(node.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD) for node in arguments.args]
    first = len(parameters) - len(arguments.defaults)
    parameters[first:] = [parameter.replace(default=None) for parameter in parameters[first:]]
    if arguments.vararg:
        parameters.append(inspect.Parameter(arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL))
    for node, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        given = inspect.Parameter.empty if default is None else None
        parameters.append(inspect.Parameter(node.arg, inspect.Parameter.KEYWORD_ONLY, default=given))
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return {parameter.name: parameter for parameter in parameters}


def _is_batch(tree: ast.Module) -> bool:
    """Whether the module says `REWARD_TYPE = "batch"`."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="REWARD_TYPE")], value=ast.Constant(value=value)):
                return value == "batch"
            case ast.AnnAssign(target=ast.Name(id="REWARD_TYPE"), value=ast.Constant(value=value)):
                return value == "batch"
    return False


def _top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.If | ast.Try):
            yield "*"  # what such a block defines depends on where it runs
