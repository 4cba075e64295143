"""KL-Cov: a KL to the old policy at the few tokens that take most entropy away, those of largest covariance.

    loss = mean over tokens of -r_t A (+ coefficient |log r_t| at chosen tokens),   A as in GRPO
    chosen: the largest share by (log p - mean) (A - mean), means over a microbatch

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Cui et al. 2025, arXiv:2505.22617, eq. 10, 13 and 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import NOT_NEGATIVE, OPEN_SHARE
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.choices import OldLogProbs
    from hybridflow.config.schema import Config as RunConfig


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of KL-Cov."""

    has_ratio: ClassVar[bool] = False  # the ratio has no bound, so importance weights multiply the loss
    share: Annotated[float, OPEN_SHARE] = 2e-4
    """Share of the tokens that are chosen, of a microbatch; at least one is."""
    covariance_kl: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of their KL to the policy before the updates. It acts where a step makes several."""

    def ratio_over(self, run: RunConfig) -> OldLogProbs:
        return "rollout_log_probs" if self.old_log_probs == "rollout" else super().ratio_over(run)


class KLCov(PolicyAlgorithm):
    """Advantages and loss of KL-Cov."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        chosen = partial(ops.kl_covariance, share=self.config.share, coefficient=self.config.covariance_kl)
        loss = self.config.policy_loss(self.run, chosen)
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
