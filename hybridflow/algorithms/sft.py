"""Supervised fine-tuning: the dataset's responses take the place of generated ones, and their likelihood is raised.

    loss of a token = -log p

    prompts with responses --> actor.update x updates

The first step of Ouyang et al. 2022, arXiv:2203.02155, sec. 3.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm, check_prompts_per_update
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation
from hybridflow.config.ranges import COUNT
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of supervised fine-tuning."""

    prompts_per_update: Annotated[int, COUNT] | None = None
    """Rows of one update; divides data.prompts_per_step. Null means all."""
    loss_aggregation: Aggregation = "token_mean"
    """How token losses become one number: mean over tokens; mean over rows of their means (sequence_mean), of their sums, or of
    their sums over data.max_response_tokens (sequence_sum); or the plain sum."""


class SFT(Algorithm):
    """Supervised fine-tuning. Rollout and reward serve validation only, and are left out without validation files."""

    config_class = Config
    rows = "responses"
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return prompts

    def learn(self, batch: Batch) -> Metrics:
        rows_per_update = self.config.prompts_per_update or self.run.data.prompts_per_step
        loss = ops.NextTokenLoss(aggregation=self.config.loss_aggregation, max_tokens=self.run.data.max_response_tokens)
        calls = [self.actor.update.start(part, loss=loss) for part in batch.split(rows_per_update)]
        return Metrics.merged(call.result() for call in calls)

    def measure(self, rows: Batch) -> Metrics:
        return self.actor.measure(rows, loss=ops.NextTokenLoss())

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        return set() if run.data.validation_files else {"rollout", "reward", "reward_model"}

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        options = run.algorithm.options
        assert isinstance(options, Config)
        return check_prompts_per_update(run, options.prompts_per_update)
