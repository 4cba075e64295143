"""Rows, configurations and contexts for tests of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, ModelConfig, RolloutConfig, TrainingConfig
from hybridflow.parallel.layout import Layout
from hybridflow.workers.base import RankContext
from tests.toy import make_tiny_model

FIRST_TOKEN, NUM_TOKENS = 4, 60
"""Ids of the tiny tokenizer's characters."""


def random_batch(lengths: Sequence[tuple[int, int]], *, seed: int = 0) -> Batch:
    """Rows of the given (prompt tokens, response tokens), with every column that the losses read."""
    rng = np.random.default_rng(seed)
    prompts, responses = np.array(lengths, np.int64).reshape(-1, 2).T

    def tokens(counts: np.ndarray) -> Ragged:
        return Ragged.from_lengths(rng.integers(FIRST_TOKEN, NUM_TOKENS, counts.sum()).astype(np.int32), counts)

    def numbers(shift: float, scale: float) -> Ragged:
        values = shift + scale * rng.standard_normal(responses.sum())
        return Ragged.from_lengths(values.astype(np.float32), responses)

    return Batch.from_columns(
        {
            "prompt": tokens(prompts),
            "response": tokens(responses),
            "prompt_tokens": prompts,
            "response_tokens": responses,
            "log_probs": numbers(-4.0, 0.5),
            "reference_log_probs": numbers(-4.0, 0.5),
            "advantages": numbers(0.0, 1.0),
            "returns": numbers(0.5, 1.0),
            "values": numbers(0.0, 0.3),
            "advantage": rng.standard_normal(len(prompts)).astype(np.float32),
            "rollout_log_probs": numbers(-4.0, 0.5),
        }
    )


def masked(batch: Batch, *, seed: int = 0) -> Batch:
    """The batch with a random `loss_mask`: rows of more than four tokens end with two masked ones, row 2 is masked entirely."""
    rng = np.random.default_rng(seed)
    rows = [rng.random(count) < 0.6 for count in batch["response_tokens"]]
    for number, row in enumerate(rows):
        if len(row) > 4:
            row[0], row[-2:] = True, False
        if number == 2:
            row[:] = False
    return batch.join(Batch.from_columns({"loss_mask": Ragged.from_rows(rows, np.bool_)}))


def disturbed(batch: Batch) -> Batch:
    """The batch with other numbers, NaN among them, at masked tokens, and other tokens where no sampled one follows."""
    mask, response = batch.tokens("loss_mask"), batch.tokens("response")
    is_behind = np.concatenate([np.logical_or.accumulate(row[::-1])[::-1] for row in mask])
    tokens = np.where(is_behind, response.values, (response.values - FIRST_TOKEN + 7) % NUM_TOKENS + FIRST_TOKEN)
    columns = {"response": Ragged(tokens.astype(np.int32), response.offsets)}
    rubbish = np.resize(np.array([np.nan, 1e9, -np.inf, 3.0], np.float32), len(mask.values))
    for name in ("log_probs", "reference_log_probs", "rollout_log_probs", "advantages", "returns", "values"):
        if name in batch:
            column = batch.tokens(name)
            columns[name] = Ragged(np.where(mask.values, column.values, rubbish).astype(np.float32), column.offsets)
    return batch.join(Batch.from_columns(dict(columns)))


def training_config(path: str, *, model: dict[str, object] | None = None, **training: object) -> Config:
    """A run on the model in `path`; `training` goes to actor and critic, `model` to the model section."""
    section = TrainingConfig(**{"learning_rate": 1e-3, "max_grad_norm": 1.0, **training})
    return Config(
        model=ModelConfig(path=path, **(model or {})), actor=section, critic=section, rollout=RolloutConfig(temperature=0.9)
    )


def context_of(role: str, layout: Layout | None = None) -> RankContext:
    """The context of this process."""
    is_joined = dist.is_initialized()
    return RankContext(
        role=role,
        rank=dist.get_rank() if is_joined else 0,
        layout=layout or Layout(),
        device=torch.device("cpu"),
        group=dist.group.WORLD if is_joined else None,
    )


def whole_weights(named: Sequence[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Copies of full tensors from sharded ones."""
    return {name: tensor.full_tensor().clone() for name, tensor in named}


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference as a share of that of `expected`."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def model_without_zero_weights(folder: str, **overrides: object) -> str:
    """A tiny model whose biases are random too: of a tensor that begins at zero, Adam's first steps amplify rounding."""
    path = make_tiny_model(folder, **overrides)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(path)
    return path
