"""From the run's configuration to what a role's model is built from."""

from __future__ import annotations

import torch

from hybridflow.config.schema import Config
from hybridflow.models.attention import implementation
from hybridflow.models.build import ModelSpec
from hybridflow.models.load import ModelSource
from hybridflow.models.lora import Adapters
from hybridflow.workers.base import RankContext


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """What layers of training models compute in."""
    if config.model.compute_dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.model.compute_dtype]


def trained_model(config: Config, context: RankContext, path: str | None) -> ModelSpec:
    """A model that is trained: float32 master weights."""
    return _spec(config, context, path, torch.float32, adapters_of(config))


def adapters_of(config: Config) -> Adapters | None:
    """The adapters that trained models get; None where all weights are trained."""
    model = config.model
    if model.lora_rank == 0:
        return None
    return Adapters(rank=model.lora_rank, alpha=model.lora_alpha, targets=model.lora_targets, seed=config.run.seed)


def frozen_model(config: Config, context: RankContext, path: str | None) -> ModelSpec:
    """A model that only computes: its weights are kept as they are computed with."""
    return _spec(config, context, path, compute_dtype(config, context.device), None)


def _spec(config: Config, context: RankContext, path: str | None, dtype: torch.dtype, adapters: Adapters | None) -> ModelSpec:
    is_checkpointed, is_compiled = config.model.gradient_checkpointing, config.model.compile
    chunk_tokens = config.model.logits_chunk_tokens
    decided_before = "what is left to the plan is decided before models are built: planner.decisions.resolved"
    assert is_checkpointed != "auto" and is_compiled != "auto", decided_before
    assert chunk_tokens != "auto", decided_before
    source = ModelSource(
        path=path or config.model.path,
        attention=implementation(config.model.attention, context.device, compute_dtype(config, context.device)),
        dtype=dtype,
        max_row_tokens=config.max_model_tokens,
        trust_remote_code=config.model.trust_remote_code,
    )
    return ModelSpec(
        source=source,
        layout=context.layout,
        device=context.device,
        compute_dtype=compute_dtype(config, context.device),
        chunk_tokens=chunk_tokens,
        float8=config.model.float8,
        gradient_checkpointing=is_checkpointed,
        compile=is_compiled,
        adapters=adapters,
    )
