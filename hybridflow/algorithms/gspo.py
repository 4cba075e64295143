"""GSPO: GRPO with one probability ratio per response, the geometric mean of its tokens' ratios.

    s = (policy(y) / old(y))^(1 / tokens);   loss = mean over rows of -min(s A, clip(s) A),   A as in GRPO

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Zheng et al. 2025, arXiv:2507.18071, eq. 5 to 7; the gradient is taken as in eq. 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import Clip, GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation
from hybridflow.config.ranges import ABOVE_ONE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of GSPO."""

    clip: Clip = (3e-4, 4e-4)
    """The ratio of a response is kept within [1 - low, 1 + high]."""
    dual_clip: Annotated[float, ABOVE_ONE] | None = None
    """Bound of the ratio where the advantage is negative; null for none."""
    loss_aggregation: Aggregation = "sequence_mean"
    """How token losses become one number."""


class GSPO(PolicyAlgorithm):
    """Advantages and loss of GSPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        bound = self.config.dual_clip or self.config.ratio_bound(self.run)
        surrogate = partial(ops.clipped, clip=self.config.clip, dual_clip=bound, ratio=ops.sequence_ratio)
        loss = self.config.policy_loss(self.run, surrogate)
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
