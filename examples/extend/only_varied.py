"""An algorithm that refuses prompts whose responses all earn the same; others take their place in the step.

Run it with `algorithm=examples.extend.only_varied:OnlyVaried`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of the section `algorithm`."""

    responses_per_prompt: int = 4


class OnlyVaried(Algorithm):
    """Three roles and one update per step."""

    config_class: ClassVar[type] = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def keep(self, group: Batch) -> bool:
        return bool(np.ptp(group["reward"]) > 0)

    def learn(self, batch: Batch) -> Metrics:
        advantage = ops.leave_one_out(batch["reward"], batch["group"]).numpy()
        loss = ops.PolicyLoss(advantage="advantage", old_log_probs=self.old_log_probs())
        told = Metrics({"varied/spread": float(batch["reward"].std())})
        return told + self.actor.update(batch.with_columns(advantage=advantage), loss=loss)
