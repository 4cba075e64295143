"""ReMax: the reward of the greedy response to the same prompt is the baseline, which costs a second rollout.

    A_t = sum of the rewards from token t on - r(greedy)
    loss = mean over rows of the sum over tokens of -min(r_t A_t, clip(r_t) A_t)
    rewards of tokens carry -beta KL to the reference;   r_t = policy / old, which is 1 in a single update: REINFORCE

    prompts --> rollout (greedy) --> reward
    prompts --> rollout --> reward --> actor: old log-probs --> reference --> actor.update x updates

Li et al. 2023, arXiv:2310.10505, eq. 5 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np

from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation, KLEstimator
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions):
    """Options of ReMax."""

    responses_per_prompt: Annotated[int, COUNT] = 1
    """Sampled responses to each prompt, beside the greedy one."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the KL to the reference counts: in each token's reward, in the loss, or nowhere (no reference is loaded)."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.01
    """Weight of the KL."""
    kl_estimator: KLEstimator = "k1"
    """Per-token estimate of the KL; k1 is for the reward, others are for either."""
    loss_aggregation: Aggregation = "sequence_mean_of_sums"
    """How token losses become one number."""


class ReMax(PolicyAlgorithm):
    """Roles, dataflow and loss of ReMax."""

    config_class = Config
    config: Config

    def collect(self, prompts: Batch) -> Batch:
        from hybridflow.workers.rollout import training_sampling

        greedy = self.respond(prompts, sampling=replace(training_sampling(self.run), temperature=0.0))
        rows = self.respond(prompts.repeat(self.config.responses_per_prompt))
        return rows.with_columns(greedy_reward=np.repeat(greedy["reward"], self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        baseline = Metrics({"remax/greedy_reward": float(batch["greedy_reward"].mean())})
        batch = self.with_log_probs(batch.with_columns(reward=batch["reward"] - batch["greedy_reward"]))
        batch = self.with_returns(batch)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return baseline + Metrics.merged(call.result() for call in updates)
