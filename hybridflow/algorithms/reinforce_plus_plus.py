"""REINFORCE++: returns of tokens, normalised over the whole step, take the place of a critic's advantages.

    A_t = (G_t - mean) / std over the step's tokens,   G_t = r_t + gamma G_(t+1),   r_t with -beta KL to the reference in it
    loss = mean over tokens of -min(ratio A_t, clip(ratio) A_t)

    prompts --> rollout --> reward --> actor: old log-probs --> reference --> actor.update x updates

Hu et al. 2025, arXiv:2501.03262, eq. 5 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import KLEstimator
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE, SHARE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions):
    """Options of REINFORCE++."""

    responses_per_prompt: Annotated[int, COUNT] = 1
    """Responses generated to each prompt."""
    gamma: Annotated[float, SHARE] = 1.0
    """Discount per token."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the KL to the reference counts: in each token's reward, in the loss, or nowhere (no reference is loaded)."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.01
    """Weight of the KL."""
    kl_estimator: KLEstimator = "k1"
    """Per-token estimate of the KL; k1 is for the reward, others are for either."""


class ReinforcePlusPlus(PolicyAlgorithm):
    """Advantages and loss of REINFORCE++."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.with_returns(self.with_log_probs(batch), gamma=self.config.gamma, whiten=True)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
