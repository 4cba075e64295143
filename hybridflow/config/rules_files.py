"""Rules about what must exist on disk: data, models, checkpoints, the folder of the run. Only this machine is looked at."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from hybridflow.config.rules_placement import divisors
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError
from hybridflow.registry import nearest
from hybridflow.tokenizers import TOKENIZER_FILES, has_tokenizer

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = ("*.safetensors", "*.bin")
PARQUET = b"PAR1"
JSON, CSV = "read_json({!r}, lines=True, dtype=False, convert_dates=False)", "read_csv({!r}, dtype=str, keep_default_na=False)"
PANDAS = {".jsonl": JSON, ".json": JSON.replace(" lines=True,", ""), ".csv": CSV}
"""What reads files of other kinds without making numbers of texts like 007."""
CONTEXT_NAMES = ("max_position_embeddings", "n_positions")
HEADS_NAMES = ("num_attention_heads", "n_head")


def data_files_exist(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """There is training data, and every named file is there."""
    if not config.data.train_files:
        yield FieldError("data.train_files", "is empty; name one or more Parquet files")
    named = {
        "data.train_files": config.data.train_files,
        "data.validation_files": config.data.validation_files,
        "data.held_out_files": config.data.held_out_files,
    }
    for key, files in named.items():
        for file in files:
            if not os.path.isfile(file):  # False too where this user may not look
                yield FieldError(key, missing(file, "file"), is_local=True)
            elif not is_parquet(file):
                yield FieldError(key, f"file {file!r} is not a whole Parquet file. {parquet_advice(file)}")


def is_parquet(file: str) -> bool:
    """Whether it begins and ends as Parquet files do."""
    if os.path.getsize(file) < 3 * len(PARQUET):  # the length of the last part stands between
        return False
    with open(file, "rb") as opened:
        first = opened.read(len(PARQUET))
        opened.seek(-len(PARQUET), os.SEEK_END)
        return first == opened.read() == PARQUET


def parquet_advice(file: str) -> str:
    """What to do with a file that should be Parquet and is not."""
    path = Path(file)
    if path.suffix not in PANDAS:
        return "Was it written completely?"
    parquet = path.with_suffix(".parquet").name
    return f"With pandas imported, this writes one: pandas.{PANDAS[path.suffix].format(path.name)}.to_parquet({parquet!r})"


def models_are_complete(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """A local folder has its parts; a name like org/name is left for the hub to resolve."""
    if not config.model.path:
        yield FieldError("model.path", "is missing; give a local folder, or a hub name such as Qwen/Qwen2.5-0.5B-Instruct")
    for key, path in model_paths(config, roles).items():
        if not Path(path).is_dir():
            if not HUB_NAME.fullmatch(path):
                yield FieldError(key, missing(path, "folder") + "; a hub name looks like org/name", is_local=True)
            continue
        if not (Path(path) / "config.json").is_file():
            yield FieldError(key, f"folder {path!r} holds no config.json. Give the folder of a saved Hugging Face model")
        elif not settings_in(path):
            yield FieldError(key, f"{path}/config.json is not JSON with the settings of a model. Was it written completely?")
        elif not any(file for pattern in WEIGHTS for file in Path(path).glob(pattern)):
            yield FieldError(key, f"folder {path!r} holds no weights ({' or '.join(WEIGHTS)})")


def tokenizer_is_there(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The folder of the tokenizer, or else of the model, holds a vocabulary."""
    key, path = "model.tokenizer", config.model.tokenizer
    if path is None:
        key, path = "model.path", config.model.path
    folder = Path(path)
    if not path or (not folder.is_dir() and (key == "model.path" or HUB_NAME.fullmatch(path))):
        return
    if not folder.is_dir():
        yield FieldError(key, missing(path, "folder"), is_local=True)
    elif not has_tokenizer(folder):
        problem = f"folder {path!r} holds no tokenizer ({', '.join(TOKENIZER_FILES)})"
        advice = "Save one there, or name another folder in model.tokenizer"
        yield FieldError(key, f"{problem}. {advice}", related=("model.tokenizer",))


def rows_fit_the_context(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Prompt and response together are no longer than a local model can read."""
    for key, path in model_paths(config, roles).items():
        context = _number_in(path, CONTEXT_NAMES)
        if context is not None and config.max_model_tokens > context:
            problem = f"make {config.max_model_tokens} tokens; {key}={path!r} reads {context}. Lower"
            if config.rollout.max_model_tokens is not None:
                problem = f"rollout.max_model_tokens={config.max_model_tokens} {problem} it"
                yield FieldError("rollout.max_model_tokens", problem, related=(key,))
                continue
            lengths = ("data.max_prompt_tokens", "data.max_response_tokens")
            asked = f"{lengths[0]}={config.data.max_prompt_tokens} and {lengths[1]}={config.data.max_response_tokens}"
            yield FieldError(lengths[1], f"{asked} {problem} one of them", related=(lengths[0], key))


def prompts_leave_room_for_a_response(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """After the longest prompt a response of at least one token fits."""
    most, prompt = config.rollout.max_model_tokens, config.data.max_prompt_tokens
    if most is not None and most <= prompt:
        problem = f"found {most}, which leaves no token for a response to a prompt of data.max_prompt_tokens={prompt}"
        advice = f"Use at least {prompt + 1}"
        yield FieldError("rollout.max_model_tokens", f"{problem}. {advice}", related=("data.max_prompt_tokens",))


def heads_divide(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Ranks that share the attention of a local model, in training or in an engine, get equally many heads."""
    for key, path in model_paths(config, roles).items():
        shares = {"model.sequence_parallel": config.model.sequence_parallel}
        if key == "model.path" and "rollout" in roles:  # the engines' too
            shares["rollout.tensor_parallel"] = config.rollout.tensor_parallel
        heads = _number_in(path, HEADS_NAMES)
        for share_key, number in shares.items():
            if heads is not None and heads % number:
                problem = f"found {number}, which does not divide the {heads} attention heads of {key}={path!r}"
                yield FieldError(share_key, f"{problem}. Use {divisors(heads)}", related=(key, "algorithm.name"))


def run_folder_can_be_written(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The run's folder is one that this user may write, or can be made."""
    folder = Path(config.run.folder).absolute()
    first = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not first.is_dir():
        kind = "a link to nowhere" if first.is_symlink() and not first.exists() else "a file"
        problem = f"{config.run.folder} cannot be written: {first} is {kind}"
    elif not os.access(first, os.W_OK | os.X_OK):
        problem = f"{config.run.folder} cannot be written: {first} is a folder that this user may not write, or read-only"
    else:
        return
    yield FieldError("run.folder", f"{problem}. Choose another", is_local=True)


def checkpoint_exists(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """A checkpoint that is named is there."""
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        problem = f"{missing(resume, 'folder')}; allowed: auto, never, or a checkpoint's folder"
        yield FieldError("checkpoint.resume", problem, is_local=True)


def model_paths(config: Config, roles: tuple[str, ...]) -> dict[str, str]:
    """The models of the run by the key that names them, each path once."""
    paths = {"model.path": config.model.path}
    for role, section in config.models.items():
        if section.path is not None and section.path not in paths.values() and role in roles:
            paths[f"{role}.path"] = section.path
    return {key: path for key, path in paths.items() if path}


def missing(path: str, kind: str) -> str:
    """That `path` is not there, and how far along it things exist."""
    whole = Path(path).absolute()
    parents = [parent for parent in whole.parents if os.path.isdir(parent) and os.access(parent, os.R_OK)]
    first_absent = whole.relative_to(parents[0]).parts[0] if parents else ""
    nearby = nearest(first_absent, [entry.name for entry in parents[0].iterdir()]) if parents else ""
    return f"{kind} {path!r} does not exist{nearby or f' (the last folder on the way that does is {parents[0]})'}"


def settings_in(model: str, file: str = "config.json") -> Mapping[str, object]:
    """Of a local folder's file, those of a text model within another first; none where it cannot be read."""
    try:
        read = json.loads((Path(model) / file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(read, dict):
        return {}
    inner = read.get("text_config")
    return {**read, **inner} if isinstance(inner, dict) else read


def _number_in(path: str, names: tuple[str, ...]) -> int | None:
    """Of a local model's configuration, by the first of the names that it has."""
    settings = settings_in(path)
    return next((found for name in names if isinstance(found := settings.get(name), int)), None)
