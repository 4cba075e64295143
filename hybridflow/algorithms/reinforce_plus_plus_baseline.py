"""REINFORCE++ with baseline: rewards less the mean of their group, normalised over the whole step.

    A = (a - mean) / std over the step's tokens,   a = r - mean of the group
    loss = mean over tokens of -min(ratio A, clip(ratio) A) + beta KL(policy || reference)

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Hu et al. 2025, arXiv:2501.03262, eq. 9 to 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import KLEstimator
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of REINFORCE++ with baseline."""

    rewrites_rewards: ClassVar[bool] = True
    kl_in: Literal["reward", "loss", "none"] = "loss"
    """Where the KL to the reference counts: in the reward, in the loss, or nowhere (no reference is loaded)."""
    kl_estimator: KLEstimator = "k2"
    """Per-token estimate of the KL."""


class ReinforcePlusPlusBaseline(PolicyAlgorithm):
    """Advantages and loss of REINFORCE++ with baseline."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        deviation = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=False)
        batch = self.with_returns(batch.with_columns(reward=deviation.numpy()), whiten=True, with_kl=False)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
