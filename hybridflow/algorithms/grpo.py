"""GRPO: rewards normalised within the responses to one prompt replace the critic.

    A = (r - mean of the group) / std of the group;   loss = mean over rows of the mean over tokens of
        -min(r_t A, clip(r_t) A) + beta KL(policy || reference),   r_t = policy / old

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4; dual clip, Ye et al. 2019, arXiv:1912.09729, eq. 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of GRPO."""

    scale_by_std: bool = True
    """Divide by the group's standard deviation."""
    kl_in: Literal["reward", "loss", "none"] = "loss"
    """Where the KL to the reference counts: in the reward, in the loss, or nowhere (no reference is loaded)."""
    loss_aggregation: Aggregation = "sequence_mean"
    """How token losses become one number."""


class GRPO(PolicyAlgorithm):
    """Advantages and loss of GRPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=self.config.scale_by_std)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
