"""Dr. GRPO: GRPO without the two divisions that favour some prompts and some lengths.

    A = r - mean of the group;   loss = mean over rows of (sum over tokens of -min(r_t A, clip(r_t) A)) / constant

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Liu et al. 2025, arXiv:2503.20783, sec. 3.2 (the unbiased variant of its eq. 3) and algorithm in appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of Dr. GRPO."""

    loss_aggregation: Aggregation = "sequence_sum"
    """How token losses become one number."""


class DrGRPO(PolicyAlgorithm):
    """Advantages and loss of Dr. GRPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=False)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
