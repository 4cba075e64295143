"""GDPO: each of several rewards is normalised within its group before they are added, so that none drowns another.

    A = (a - mean) / std over the step's tokens,   a = sum over rewards k of w_k (r_k - mean of the group) / std of the group
    loss = mean over tokens of -min(ratio A, clip(ratio) A) [+ beta KL(policy || reference)]

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Liu et al. 2026, arXiv:2601.05242.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of GDPO."""

    rewards: tuple[str, ...] = ()
    """Numbers that the reward function returns, of which each is a reward (column `reward/NAME`); none means the reward
    itself."""
    reward_weights: tuple[float, ...] = ()
    """One for each; none means 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(
                f"reward_weights: found {len(self.reward_weights)} for {len(self.rewards)} rewards; give one for each"
            )


class GDPO(Algorithm):
    """Roles, dataflow and loss of GDPO."""

    config_class = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reference: ReferenceWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        batch = self.with_log_probs(self.with_length_penalty(batch))
        names = [f"reward/{name}" for name in self.config.rewards] or ["reward"]
        weights = self.config.reward_weights or [1.0] * len(names)
        parts = [np.nan_to_num(batch[name]) for name in names]  # of a row whose reward failed a part is NaN
        each = [weight * ops.group_normalized(part, batch["group"]) for weight, part in zip(weights, parts, strict=True)]
        batch = self.with_returns(batch.with_columns(reward=sum(each[1:], each[0]).numpy()), whiten=True)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(update.result() for update in updates)
