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
from hybridflow.config.schema import Config, RewardTerm
from hybridflow.config.user_code import name_errors, parsed, top_level_names
from hybridflow.errors import FieldError
from hybridflow.user_file import split_name


def rewards_are_told_once(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """`reward.functions` stands in place of the keys of a single reward."""
    reward = config.reward
    single = {"reward.path": reward.path is not None, "reward.options": bool(reward.options)}
    for key in [key for key, is_given in single.items() if is_given and reward.functions]:
        yield FieldError(key, "is of a single reward, but reward.functions lists several. Move it into one of them")


def reward_file_exists(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The user's files are there."""
    for section, term in sections(config).items():
        if term.path is not None and not os.path.isfile(term.path):
            yield FieldError(f"{section}.path", missing(term.path, "file"), is_local=True)


def reward_function_can_be_called(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The user's files parse and define the functions; these or the built-in rules take their `options`."""
    for section, term in sections(config).items():
        in_file = (term.path, term.function) if term.path is not None else split_name(term.name)
        if in_file is not None and os.path.isfile(in_file[0]):
            yield from _own_function(section, term, Path(in_file[0]), in_file[1])
        elif in_file is None and term.name in registry.REWARDS:
            module, _, function = registry.REWARDS[term.name].partition(":")
            spec = importlib.util.find_spec(module)
            assert spec is not None and spec.origin is not None, f"{module} has no file"
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
            yield from _signature_errors(section, term, f"{section}.name", tree, function)


def sections(config: Config) -> dict[str, RewardTerm]:
    """What scores, by the key of the section that says so."""
    if not config.reward.functions:
        return {"reward": config.reward.terms[0]}
    return {f"reward.functions.{number}": term for number, term in enumerate(config.reward.functions)}


def _own_function(section: str, term: RewardTerm, file: Path, name: str) -> Iterator[FieldError]:
    yield from name_errors(f"{section}.function", file, name, file_key=f"{section}.path")
    try:
        tree = parsed(file)
    except ValueError:
        return
    names = list(top_level_names(tree))
    if "*" not in names and names.count(name) == 1:
        yield from _signature_errors(section, term, f"{section}.function", tree, name)


def _signature_errors(section: str, term: RewardTerm, key: str, tree: ast.Module, name: str) -> Iterator[FieldError]:
    """Where `name` is a plain function; what a decorator or a call has made is asked when it is loaded."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name]
    if len(functions) != 1 or functions[0].decorator_list:
        return
    try:
        call_for(_parameters(functions[0].args), term.options, is_batch=_is_batch(tree))
    except SignatureError as error:
        asked = term.name if term.path is None else f"{name} of {term.path}"
        where = f"{section}.options.{error.option}" if error.option else key
        about = (f"{section}.options", f"{section}.name" if term.path is None else f"{section}.path")
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
