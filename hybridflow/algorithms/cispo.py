"""CISPO: the importance weight is clipped, not the token's gradient, so that rare tokens go on learning.

    loss = mean over tokens of -sg(clip(r_t)) A log p,   A as in GRPO,   sg: without gradient

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

MiniMax 2025, arXiv:2506.13585, eq. 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import Clip, GroupOptions
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of CISPO."""

    clip: Clip = (1.0, 0.28)
    """Importance weights are kept within [1 - low, 1 + high]; a low of 1 is no lower bound."""


class CISPO(PolicyAlgorithm):
    """Advantages and loss of CISPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        loss = self.config.policy_loss(self.run, partial(ops.clipped_weight, clip=self.config.clip))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
