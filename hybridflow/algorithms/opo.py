"""OPO: exactly on-policy updates with the baseline of least variance, the mean reward weighted by lengths.

    A = r - sum of (tokens r) / sum of tokens, over the group
    loss = mean over tokens of -min(r_t A, clip(r_t) A),   r_t = policy / old, which is 1 in a single update: -A log p

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Hao et al. 2025, arXiv:2505.23585, eq. 9.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import COUNT
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of OPO."""

    responses_per_prompt: Annotated[int, COUNT] = 8
    """Responses generated to each prompt: the group whose weighted mean is the baseline."""


class OPO(PolicyAlgorithm):
    """Advantages and loss of OPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        tokens = batch["loss_tokens" if "loss_tokens" in batch else "response_tokens"]
        advantage = ops.length_weighted(batch["reward"], batch["group"], tokens)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
