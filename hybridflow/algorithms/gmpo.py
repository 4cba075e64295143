"""GMPO: the geometric mean of a response's ratios in place of their arithmetic mean, which single tokens dominate.

    loss = mean over rows of -A exp(mean over tokens of clip(log r_t)),   A as in GRPO

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Zhao et al. 2025, arXiv:2507.20673, eq. 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import Clip, GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of GMPO."""

    clip: Clip = (0.4, 0.4)
    """The logarithm of a token's ratio is kept within [-low, high]."""
    loss_aggregation: Aggregation = "sequence_mean"
    """How token losses become one number."""


class GMPO(PolicyAlgorithm):
    """Advantages and loss of GMPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        loss = replace(
            self.config.policy_loss(self.run, partial(ops.geometric_mean, clip=self.config.clip)), pools_weights=True
        )
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
