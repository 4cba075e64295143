"""GRPO for the best of n (pass@k): only the best response to a prompt learns, by how much it is better than the second.

    A of the best = (r - r of the second) / std of the group, A of all others = 0;   loss as of PPO, mean over tokens

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Tang et al. 2025, arXiv:2503.19595, eq. 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import AT_LEAST_TWO
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of GRPO for the best of n."""

    responses_per_prompt: Annotated[int, AT_LEAST_TWO] = 4
    """Responses generated to each prompt: the n of best of n."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation."""


class GRPOPassAtK(PolicyAlgorithm):
    """Advantages and loss of GRPO for the best of n."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.best_of_group(batch["reward"], batch["group"], scale_by_std=self.config.scale_by_std)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
