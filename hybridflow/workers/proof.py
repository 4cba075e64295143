"""Has a sync reached what the engine cannot show? A perturbed probe, once, at the first sync.

The engine started from the weights that the first sync brings, so an engine that took the names and not the values would agree
with the trainer until it has learned something. Hence half of the elements of every weight that cannot be read back change
their sign on both sides, and both compute the same responses; a part that the engine left as it was shows in the tokens that
pass it. Then the signs change back, which is exact, and the weights are given once more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.config.schema import Config
from hybridflow.errors import WeightMismatchError
from hybridflow.models.load import load_config
from hybridflow.models.self_test import text_rows
from hybridflow.rollout.base import Engine, Request, Sampling
from hybridflow.workers.base import RankContext
from hybridflow.workers.probe import ScoresRows, probe_dtype, scored

NUM_PROMPTS, PROMPT_TOKENS, RESPONSE_TOKENS = 6, 48, 6
"""Enough different tokens that some reach each of many experts."""
TOLERANCE = {"float32": 1e-2, "bfloat16": 1.0}
"""Largest |difference| of a token in nats, by the coarser dtype of the two sides."""


@runtime_checkable
class FlipsSigns(Protocol):
    """A worker whose weights can be perturbed."""

    def flip_signs(self, names: Collection[str]) -> None:
        """Change the sign of half of the elements, always the same, of the weights of these names: twice is not at all."""
        ...


def prove(
    names: Sequence[str], actor: FlipsSigns, engine: Engine, config: Config, context: RankContext, *, sync: Callable[[], object]
) -> None:
    """Perturb the weights of `names`, `sync` them, and compare. Every rank of the pool calls this.

    Raises:
        WeightMismatchError: it names the kinds of weights whose values the engine did not take.
    """

    def differs_with(perturbed: Sequence[str]) -> float | None:
        """The largest difference where it is above the tolerance."""
        assert isinstance(actor, ScoresRows)
        actor.flip_signs(perturbed)
        try:
            sync()
            difference = _largest_difference(engine, actor, config, context)
        finally:
            actor.flip_signs(perturbed)
        return None if difference <= TOLERANCE[probe_dtype(engine, config, context)] else difference

    difference = differs_with(names)
    if difference is not None:
        kinds = kinds_of(names)
        wrong = [kind for kind, members in kinds.items() if differs_with(members) is not None] or list(kinds)
    sync()
    if difference is not None:
        raise WeightMismatchError(
            f"the engine of {context.role} rank {context.rank} accepts weights and does not take their values: with other "
            f"values of {', '.join(wrong)} its log-probabilities differ from the trainer's by up to {difference:.3g} nats. "
            "Responses would come from other weights than those that learn. Look at the engine's load_weights for these names; "
            "rollout.verify_weights=false turns this check off"
        )


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Weights that differ in numbers only are of one kind: `model.layers.*.mlp.down_proj.weight`."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return kinds


def _largest_difference(engine: Engine, actor: ScoresRows, config: Config, context: RankContext) -> float:
    most = engine.spec.max_model_tokens
    num_response = min(RESPONSE_TOKENS, most - 1)
    lengths = (min(PROMPT_TOKENS, most - num_response),) * NUM_PROMPTS
    prompts = text_rows(load_config(engine.spec.model, trust_remote_code=config.model.trust_remote_code), lengths)
    sampling = Sampling(temperature=config.rollout.temperature or 1.0, max_tokens=num_response, ignore_eos=True)
    requests = [Request(id=i, prompt=row.astype(np.int32), sampling=sampling, seed=i) for i, row in enumerate(prompts)]
    found, trained = scored(requests, engine.generate(requests), actor)
    worst = torch.tensor(np.abs(found - trained).max(), device=context.device).nan_to_num(nan=torch.inf)
    if context.group is not None:  # all ranks go on alike
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=context.group)
    return float(worst)
