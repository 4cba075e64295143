"""Reward modelling: a model learns to give the chosen of two responses the higher number.

Bradley and Terry's likelihood, Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm, check_prompts_per_update
from hybridflow.batch import Batch
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.reward_model import RewardModelWorker


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward modelling."""

    prompts_per_update: Annotated[int, COUNT] | None = None
    """Pairs of one update; divides data.prompts_per_step. Null means all."""
    centring_coefficient: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the square of a pair's summed scores, which keeps scores around 0."""


class RewardModelling(Algorithm):
    """One role, which `reward_model.*` configures. `data.held_out_files` are measured with every validation."""

    config_class = Config
    rows = "preferences"
    trained_roles = ("reward_model",)
    config: Config
    reward_model: RewardModelWorker

    def collect(self, prompts: Batch) -> Batch:
        return prompts

    def learn(self, batch: Batch) -> Metrics:
        pairs_per_update = self.config.prompts_per_update or self.run.data.prompts_per_step
        parts = batch.split(2 * pairs_per_update)
        calls = [self.reward_model.update.start(part, loss=self.loss(batch)) for part in parts]
        return Metrics.merged(call.result() for call in calls)

    def measure(self, rows: Batch) -> Metrics:
        return self.reward_model.measure(rows, loss=self.loss(rows))

    def loss(self, batch: Batch) -> ops.RewardModelLoss:
        """With a margin where the dataset has one."""
        return ops.RewardModelLoss(centring_coefficient=self.config.centring_coefficient, has_margin="margin" in batch)

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        options = run.algorithm.options
        assert isinstance(options, Config)
        return check_prompts_per_update(run, options.prompts_per_update)
