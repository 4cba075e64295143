"""A loss that needs row lengths: each response weighs by the square root of its length.

That is between a mean over rows and one over tokens.

Run it with `algorithm=examples.extend.length_loss:SquareRoot`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics
from hybridflow.ops.reduce import TokenMetric
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker


def square_root(tokens: ops.PolicyTokens) -> tuple[torch.Tensor, dict[str, TokenMetric]]:
    """-r A over the square root of the row's length, and a metric of its own, `actor/row_weight`."""
    weight_T = tokens.spread(tokens.lengths_B.clamp(min=1).rsqrt())
    return -ops.token_ratio(tokens) * tokens.advantage_T * weight_T, {"row_weight": TokenMetric.mean(weight_T)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of the section `algorithm`."""

    responses_per_prompt: int = 4


class SquareRoot(Algorithm):
    """Three roles and one update per step."""

    config_class: ClassVar[type] = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        advantage = ops.group_normalized(batch["reward"], batch["group"]).numpy()
        loss = ops.PolicyLoss(
            surrogate=square_root,
            advantage="advantage",
            aggregation="sequence_mean_of_sums",
            old_log_probs=self.old_log_probs(),
        )
        return self.actor.update(batch.with_columns(advantage=advantage), loss=loss)
