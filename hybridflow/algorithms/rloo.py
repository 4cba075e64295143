"""RLOO: the mean reward of the other responses to the same prompt is the baseline of each.

    A = r - mean of the group's other rewards;   loss = mean over rows of the sum over tokens of -min(r_t A, clip(r_t) A)
    r of a row less beta times its KL to the reference;   r_t = policy / old, which is 1 in a single update: REINFORCE

    prompts --> rollout --> reward --> actor: old log-probs --> reference --> actor.update x updates

Ahmadian et al. 2024, arXiv:2402.14740, eq. 7; the KL, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation, KLEstimator
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of RLOO."""

    responses_per_prompt: Annotated[int, COUNT] = 4
    """Responses generated to each prompt; the mean reward of the others is the baseline."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the KL to the reference counts: in the reward, in the loss, or nowhere (no reference is loaded)."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.03
    """Weight of the KL."""
    kl_estimator: KLEstimator = "k1"
    """Per-token estimate of the KL; k1 is for the reward, others are for either."""
    loss_aggregation: Aggregation = "sequence_mean_of_sums"
    """How token losses become one number."""


class RLOO(PolicyAlgorithm):
    """Advantages and loss of RLOO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.leave_one_out(batch["reward"], batch["group"])
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
