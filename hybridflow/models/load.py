"""Reading language models from a local Hugging Face folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hybridflow.errors import ModelError

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


def load_causal_lm(source: ModelSource, *, is_skeleton: bool = False) -> PreTrainedModel:
    """The model on the CPU, ready for training without dropout; a skeleton has its shapes but no values (meta device).

    Raises:
        ModelError: the folder or name holds no causal language model that can be trained on packed rows of that length.
    """
    config = load_config(source.path, trust_remote_code=source.trust_remote_code)
    _check_window(config, source)  # before the weights are read, which takes long
    _switch_off_randomness(config)
    with _explained(source.path, "a causal language model"):
        if is_skeleton:
            remote_code = source.trust_remote_code
            model = skeleton(config, dtype=source.dtype, attention=source.attention, trust_remote_code=remote_code)
        else:
            model = _with_weights(source, config)
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


def _with_weights(source: ModelSource, config: PretrainedConfig) -> PreTrainedModel:
    # Bars of several roles and ranks would overwrite each other.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        source.path,
        config=config,
        dtype=source.dtype,
        attn_implementation=source.attention,
        trust_remote_code=source.trust_remote_code,
    )
    return model


def load_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's own configuration.

    Raises:
        ModelError: there is none.
    """
    if _looks_local(path) and not (Path(path) / "config.json").is_file():
        found = "no such folder" if not Path(path).is_dir() else "no config.json in it"
        raise ModelError(f"model folder {path!r}: {found}. Give a Hugging Face model folder, or a name on the hub")
    with _explained(path, "a model configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return config


def _looks_local(path: str) -> bool:
    """Whether `path` can only be meant as a folder here: hub names have at most one slash and begin with neither / nor ."""
    return Path(path).is_dir() or path.startswith(("/", ".", "~")) or path.count("/") > 1


@contextmanager
def _explained(path: str, wanted: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError) as error:
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


def _check_window(config: PretrainedConfig, source: ModelSource) -> None:
    """Refuse rows beyond a sliding window before there are any: packed attention sees a row from its beginning."""
    window = _sliding_window(config.get_text_config().to_dict())
    if window is not None and source.max_row_tokens is not None and source.max_row_tokens > window:
        raise ModelError(
            f"{source.path!r} attends to the last {window} tokens only (sliding window), which packed attention does not do, "
            f"and rows may have {source.max_row_tokens} tokens (data.max_prompt_tokens + data.max_response_tokens). Lower "
            f"these to {window} together, or use another model"
        )


def _sliding_window(settings: Mapping[str, object]) -> int | None:
    """Tokens that a layer with a sliding window sees; None where no layer has one. Without `layer_types` all layers do."""
    layer_types, window = settings.get("layer_types"), settings.get("sliding_window")
    is_used = settings.get("use_sliding_window") is not False
    has_such_layers = not isinstance(layer_types, list) or "sliding_attention" in layer_types
    return window if isinstance(window, int) and is_used and has_such_layers else None


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
