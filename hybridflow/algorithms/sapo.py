"""SAPO: a smooth gate in place of the clip, tighter for tokens of bad responses.

    loss = mean over rows of the mean over tokens of -A (4 / tau) sigmoid(tau (r_t - 1)),   A as in GRPO,   tau by the sign of A

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Gao et al. 2025, arXiv:2511.20347, eq. 5 and 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation
from hybridflow.config.ranges import POSITIVE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of SAPO."""

    tau_positive: Annotated[float, POSITIVE] = 1.0
    """Sharpness of the gate where the advantage is positive."""
    tau_negative: Annotated[float, POSITIVE] = 1.05
    """Sharpness of the gate elsewhere."""
    loss_aggregation: Aggregation = "sequence_mean"
    """How token losses become one number."""


class SAPO(PolicyAlgorithm):
    """Advantages and loss of SAPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        gate = partial(ops.soft_gate, positive=self.config.tau_positive, negative=self.config.tau_negative)
        loss = self.config.policy_loss(self.run, gate)
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
