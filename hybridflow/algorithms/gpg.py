"""GPG: plain policy gradients of group-centred rewards, no ratio, no clip, no KL, no critic.

    A = alpha (r - mean of the group),   alpha = rows / informative rows;   loss = mean over tokens of -A log p

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Chu et al. 2025, arXiv:2504.02546, eq. 5 to 7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of GPG."""

    has_ratio: ClassVar[bool] = False
    scale_by_std: bool = False
    """Divide by the group's standard deviation."""
    informative: Literal["varied_groups", "rewards"] = "varied_groups"
    """Rows that count as informative: those of groups with several rewards; or, as in the authors' code, those whose reward is
    not 0."""


class GPG(PolicyAlgorithm):
    """Advantages and loss of GPG."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        reward, group = batch["reward"], batch["group"]
        informative = ops.is_varied(reward, group) if self.config.informative == "varied_groups" else reward
        advantage = ops.rescaled(ops.group_normalized(reward, group, scale_by_std=self.config.scale_by_std), informative)
        loss = self.config.policy_loss(self.run, ops.policy_gradient)
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
