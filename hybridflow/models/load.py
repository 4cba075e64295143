"""Reading language models from a local Hugging Face folder or the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from hybridflow.errors import HybridflowError, ModelError, listed

logger = logging.getLogger("hybridflow")

LoadingInfo = Mapping[str, Collection[Any]]
WHOLE = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")
"""safetensors' names of integers."""
RANDOM_SETTINGS = ("dropout", "layerdrop", "pdrop")
"""What settings have in their names by which training would leave out parts at random."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model, and how it is to be built."""

    path: str
    """Local folder or hub name of a causal language model."""
    attention: str
    """Name under which transformers finds the attention; see `attention.implementation`."""
    dtype: torch.dtype
    """Of the parameters."""
    max_row_tokens: int | None = None
    """Tokens of the longest row, prompt and response together; None where no rows will be computed."""
    trust_remote_code: bool = False


def load_causal_lm(source: ModelSource, *, is_skeleton: bool = False, is_policy: bool = True) -> PreTrainedModel:
    """The model on the CPU, ready for training without dropout; a skeleton has its shapes but no values (meta device).

    Raises:
        ModelError: the folder or name holds no causal language model that can be trained on packed rows of that length.
    """
    config = load_config(source.path, trust_remote_code=source.trust_remote_code)
    _check_length(config, source)  # before the weights are read, which takes long
    _switch_off_randomness(config)
    with explained(source.path, "a causal language model"):
        if is_skeleton:
            remote_code = source.trust_remote_code
            model = skeleton(config, dtype=source.dtype, attention=source.attention, trust_remote_code=remote_code)
        else:
            model = _with_weights(source, config, is_policy=is_policy)
    _check_trainable(model, source.path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a configuration with names and shapes, and no values: its tensors are on the meta device."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    return model


def _with_weights(source: ModelSource, config: PretrainedConfig, *, is_policy: bool) -> PreTrainedModel:
    # Bars of several roles and ranks would overwrite each other.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.path,
        config=config,
        dtype=source.dtype,
        attn_implementation=source.attention,
        trust_remote_code=source.trust_remote_code,
        ignore_mismatched_sizes=True,  # they are told by name below
        output_loading_info=True,
    )
    model, found = cast("tuple[PreTrainedModel, LoadingInfo]", loaded)
    layers = [name for name, module in model.named_modules() if module is output_layer(model)]
    left_out = {f"{layer}.{name}" for layer in layers for name, _ in output_layer(model).named_parameters()}
    check_complete(source.path, found, may_miss=set() if is_policy else left_out)
    check_numbers(source.path, model)
    if unused := sorted(found["unexpected_keys"]):
        logger.warning("%r: %d weight(s) have no place in the model: %s", source.path, len(unused), listed(unused))
    return model


def check_complete(path: str, found: LoadingInfo, *, may_miss: Collection[str] = ()) -> None:
    """Refuse files that lack weights, which transformers would draw at random; `may_miss` are names that nobody needs.

    Raises:
        ModelError: a weight is missing, or has another shape.
    """
    if other := sorted(found["mismatched_keys"]):
        shapes = [f"{name} has {tuple(there)}, not {tuple(wanted)}" for name, there, wanted in other]
        raise ModelError(f"{path!r} does not fit its own config.json, by which {listed(shapes)}. Give the one of these weights")
    if missing := sorted(set(found["missing_keys"]) - set(may_miss)):
        problem = f"{path!r} lacks {len(missing)} weight(s) of its config.json, which would be random: {listed(missing)}"
        raise ModelError(f"{problem}. Was it saved or copied completely?")


def check_numbers(path: str, model: PreTrainedModel) -> None:
    """Refuse a model whose weights are integers, which transformers takes as they are: what they stand for says a scale that
    its configuration does not name.

    Raises:
        ModelError: at least one is, or a file is damaged.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for file in _weight_files(path):
        with explained(path, "a causal language model"), safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name in parameters]  # noqa: SIM118 (no dict)
            if whole := [name for name in names if opened.get_slice(name).get_dtype() in WHOLE]:
                problem = f"{path!r} holds {len(whole)} weight(s) as integers: {listed(whole)}"
                raise ModelError(f"{problem}. Its config.json names no quantization; give the model in floating point")


def _weight_files(path: str) -> list[Path]:
    """The files of safetensors that transformers has read; others may lie beside them. None where its format is another."""
    if (whole := _file_of(path, SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := _file_of(path, SAFE_WEIGHTS_INDEX_NAME)) is None:
        return []
    return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _file_of(path: str, name: str) -> Path | None:
    """A file of a model in its folder or in the hub's cache."""
    found: str | None = cached_file(
        path,
        name,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def load_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        ModelError: there is none.
    """
    if _looks_local(path) and not (Path(path) / "config.json").is_file():
        found = "no such folder" if not Path(path).is_dir() else "no config.json in it"
        raise ModelError(f"model folder {path!r}: {found}. Give a Hugging Face model folder, or a name on the hub")
    with explained(path, "a model configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config


def _looks_local(path: str) -> bool:
    """Whether `path` can only be meant as a folder here: hub names have at most one slash and begin with neither / nor ."""
    return Path(path).is_dir() or path.startswith(("/", ".", "~")) or path.count("/") > 1


@contextmanager
def explained(path: str, wanted: str) -> Iterator[None]:
    """A block in which a model is read; what fails in it becomes a ModelError in one line."""
    try:
        yield
    except HybridflowError:
        raise
    except Exception as error:  # what damaged or foreign files end in is open: SafetensorError, a failed validation and more
        text = str(error).strip().splitlines()
        reason = " ".join(text[:2]) if text else "no further words"
        if isinstance(error, KeyError) and "hybridflow" in reason:
            reason = "its class does not take its attention from transformers' AttentionInterface"
        raise ModelError(f"{path!r} does not load as {wanted}: {type(error).__name__}: {reason}") from error


def _check_trainable(model: PreTrainedModel, path: str) -> None:
    """Refuse what has no shape of a policy; whether it computes rightly is for the self-test to find out."""
    if not isinstance(output_layer(model), nn.Linear):
        raise ModelError(f"{path!r} ({type(model).__name__}) has no linear output layer over a vocabulary, so it is no policy")
    if model.base_model is model:
        raise ModelError(f"{path!r} ({type(model).__name__}) does not separate its backbone from its output layer")


def _check_length(config: PretrainedConfig, source: ModelSource) -> None:
    """Refuse rows beyond a sliding window before there are any: packed attention sees a row from its beginning."""
    limit = length_limit(config)
    if limit is not None and source.max_row_tokens is not None and source.max_row_tokens > limit.tokens:
        raise ModelError(
            f"{source.path!r} {limit.what}, which packed attention does not do, "
            f"and rows may have {source.max_row_tokens} tokens (data.max_prompt_tokens + data.max_response_tokens). Lower "
            f"these to {limit.tokens} together, or use another model"
        )


@dataclass(frozen=True)
class LengthLimit:
    """Up to where a model computes a row like any other. No self-test on short rows sees what lies beyond."""

    tokens: int
    what: str
    """What it does with longer rows, as the rest of a sentence."""


def length_limit(config: PretrainedConfig) -> LengthLimit | None:
    """The least of those that a configuration sets; None where it sets none."""
    settings = config.get_text_config().to_dict()
    found = [limit for limit in (_sliding_window(settings), _chunk(settings), *_rope_limits(settings)) if limit is not None]
    return min(found, key=lambda limit: limit.tokens, default=None)


def _sliding_window(settings: Mapping[str, object]) -> LengthLimit | None:
    """Tokens that a layer with a sliding window sees; None where no layer has one. Without `layer_types` all layers do."""
    layer_types, window = settings.get("layer_types"), settings.get("sliding_window")
    is_used = settings.get("use_sliding_window") is not False
    has_such_layers = not isinstance(layer_types, list) or "sliding_attention" in layer_types
    if not (isinstance(window, int) and is_used and has_such_layers):
        return None
    return LengthLimit(window, f"attends to the last {window} tokens only (sliding window)")


def _chunk(settings: Mapping[str, object]) -> LengthLimit | None:
    size = settings.get("attention_chunk_size")
    return LengthLimit(size, f"attends within chunks of {size} tokens") if isinstance(size, int) else None


def _rope_limits(settings: Mapping[str, object]) -> Iterator[LengthLimit]:
    """Where positions of all rows computed together change with the longest of them."""
    for name in ("rope_parameters", "rope_scaling"):
        given = settings.get(name)
        if not isinstance(given, Mapping):
            continue
        for rope in (given, *(part for part in given.values() if isinstance(part, Mapping))):  # or one for each kind of layer
            kind = rope.get("rope_type", rope.get("type"))
            tokens = rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
            tokens = tokens or settings.get("max_position_embeddings")
            if kind in ("dynamic", "longrope") and isinstance(tokens, int):
                yield LengthLimit(tokens, f"rotates positions beyond {tokens} by the longest row at hand (rope_type {kind})")


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer from hidden channels to the vocabulary."""
    layer: nn.Linear = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return layer


def _switch_off_randomness(config: PretrainedConfig) -> None:
    """Old and new log-probabilities must come from the same network, so nothing is dropped at random."""
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and any(word in name for word in RANDOM_SETTINGS):
                setattr(part, name, 0.0)
