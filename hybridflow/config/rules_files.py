"""Rules about what must exist on disk: data, models, reward functions, checkpoints. Only this machine is looked at."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from hybridflow.config.schema import Config
from hybridflow.errors import Mistake
from hybridflow.registry import nearest

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = ("*.safetensors", "*.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""Any of these holds a vocabulary."""


def data_files_exist(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """There is training data, and every named file is there."""
    if not config.data.train_files:
        yield Mistake("data.train_files", "is empty; name one or more Parquet files")
    named = {"data.train_files": config.data.train_files, "data.validation_files": config.data.validation_files}
    for key, files in named.items():
        for file in files:
            if not Path(file).is_file():
                yield Mistake(key, _missing(file, "file"))


def models_are_complete(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """A local folder has its parts; a name like org/name is left for the hub to resolve."""
    if not config.model.path:
        yield Mistake("model.path", "is missing; give a local folder, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct")
    for key, path in _model_paths(config, roles).items():
        if not Path(path).is_dir():
            if not HUB_NAME.fullmatch(path):
                yield Mistake(key, _missing(path, "folder") + "; a hub name looks like org/name")
            continue
        if not (Path(path) / "config.json").is_file():
            yield Mistake(key, f"folder {path!r} holds no config.json. Give the folder of a saved Hugging Face model")
        elif not any(file for pattern in WEIGHTS for file in Path(path).glob(pattern)):
            yield Mistake(key, f"folder {path!r} holds no weights ({' or '.join(WEIGHTS)})")
    yield from _tokenizer_is_there(config)


def rows_fit_the_context(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """Prompt and response together are no longer than a local model can read."""
    for key, path in _model_paths(config, roles).items():
        file = Path(path) / "config.json"
        if not file.is_file():
            continue
        try:
            context = _context_tokens(json.loads(file.read_text(encoding="utf-8")))
        except ValueError as error:
            yield Mistake(key, f"{file} is not JSON: {error}")
            continue
        if context is not None and config.max_model_tokens > context:
            data = config.data
            asked = f"data.max_prompt_tokens={data.max_prompt_tokens} and data.max_response_tokens={data.max_response_tokens}"
            problem = f"{asked} make {config.max_model_tokens} tokens; {key}={path!r} reads {context}. Lower one of them"
            yield Mistake("data.max_response_tokens", problem)


def reward_file_has_the_function(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """The user's reward file parses and defines the function; it is not executed."""
    if config.reward.path is None:
        return
    file = Path(config.reward.path)
    if not file.is_file():
        yield Mistake("reward.path", _missing(str(file), "file"))
        return
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        yield Mistake("reward.path", f"{file} is not Python: {error}")
        return
    names = list(_top_level_names(tree))
    if "*" not in names and config.reward.function not in names:
        defined = f" It defines: {', '.join(names)}" if names else ""
        problem = f"{file} has no {config.reward.function!r}{nearest(config.reward.function, names) or '.'}{defined}"
        yield Mistake("reward.function", problem)


def checkpoint_exists(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """A checkpoint that is named is there."""
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        yield Mistake("checkpoint.resume", f"{_missing(resume, 'folder')}; allowed: auto, never, or a checkpoint's folder")


def _model_paths(config: Config, roles: tuple[str, ...]) -> dict[str, str]:
    paths = {"model.path": config.model.path}
    own = {"actor": config.actor.path, "critic": config.critic.path, "reference": config.reference.path}
    for role, path in own.items():
        if path is not None and path not in paths.values() and role in roles:
            paths[f"{role}.path"] = path
    return {key: path for key, path in paths.items() if path}


def _tokenizer_is_there(config: Config) -> Iterator[Mistake]:
    key, path = "model.tokenizer", config.model.tokenizer
    if path is None:
        key, path = "model.path", config.model.path
    folder = Path(path)
    if not path or (not folder.is_dir() and (key == "model.path" or HUB_NAME.fullmatch(path))):
        return
    if not folder.is_dir():
        yield Mistake(key, _missing(path, "folder"))
    elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
        problem = f"folder {path!r} holds no tokenizer ({', '.join(TOKENIZER_FILES)})"
        yield Mistake(key, f"{problem}. Save one there, or name another folder in model.tokenizer")


def _context_tokens(model_config: object) -> int | None:
    if not isinstance(model_config, dict):
        raise ValueError("the top level is not an object")
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(model_config.get(name), int):
            return int(model_config[name])
    text_config = model_config.get("text_config")
    return _context_tokens(text_config) if isinstance(text_config, dict) else None


def _top_level_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.If | ast.Try):
            yield "*"  # what such a block defines depends on where it runs


def _missing(path: str, kind: str) -> str:
    """That `path` is not there, and how far along it things exist."""
    parents = [parent for parent in Path(path).absolute().parents if parent.is_dir()]
    nearby = nearest(Path(path).name, [entry.name for entry in parents[0].iterdir()]) if parents else ""
    return f"{kind} {path!r} does not exist{nearby or f' (the last folder on the way that does is {parents[0]})'}"
