"""A role of your own: a judge that takes something off the reward of long responses, and an algorithm that asks it.

Run it with `algorithm=examples.extend.brevity_judge:JudgedRLOO` and
`placement.workers.judge=examples.extend.brevity_judge:JudgeWorker`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import remote
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker


class JudgeWorker(Worker):
    """Runs on every rank of its pool. Give it a model in `__init__` if it needs one."""

    is_distributed: ClassVar[bool] = False

    @remote("split_by_data_rank")
    def judge(self, batch: Batch) -> Batch:
        """Column `penalty`: the share of the allowed tokens that each response took."""
        lengths = batch.tokens("response").lengths
        return Batch.from_columns({"penalty": (lengths / self.config.data.max_response_tokens).astype(np.float32)})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the algorithm."""

    responses_per_prompt: int = 4
    """Responses to each prompt."""
    penalty_weight: float = 0.1
    """How much of the reward brevity is."""


class JudgedRLOO(Algorithm):
    """RLOO with a second opinion."""

    config_class: ClassVar[type] = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker
    judge: JudgeWorker

    def collect(self, prompts: Batch) -> Batch:
        rows = prompts.repeat(self.config.responses_per_prompt)
        rows = rows.join(self.rollout.generate(rows))
        judged = self.judge.judge.start(rows)  # runs while the reward function does, on another pool
        return rows.join(self.reward.score(rows), judged.result())

    def learn(self, batch: Batch) -> Metrics:
        reward = batch["reward"] - self.config.penalty_weight * batch["penalty"]
        advantage = ops.leave_one_out(reward, batch["group"])
        loss = ops.PolicyLoss(advantage="advantage", old_log_probs=self.old_log_probs())
        metrics = self.actor.update(batch.with_columns(advantage=advantage.numpy()), loss=loss)
        return metrics + Metrics({"judge/penalty": float(batch["penalty"].mean())})
