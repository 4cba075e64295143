"""Supervised fine-tuning: the dataset's responses take the place of generated ones, and their likelihood is raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm, check_prompts_per_update
from hybridflow.batch import Batch
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
        calls = [self.actor.update.start(part, loss=ops.NextTokenLoss()) for part in batch.split(rows_per_update)]
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
