"""Evaluation: the roles that answer and score, and nothing that learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


class Evaluation(Algorithm):
    """What `python -m hybridflow.evaluate` launches."""

    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts)

    def learn(self, batch: Batch) -> Metrics:
        return Metrics()
