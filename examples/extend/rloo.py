"""An algorithm of your own: RLOO, where each response is compared with the others to its prompt.

Ahmadian et al. 2024, arXiv:2402.14740, eq. 7. Run it with `algorithm=examples.extend.rloo:RLOO`.
"""

from dataclasses import dataclass
from typing import ClassVar

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of RLOO: keys of the section `algorithm`."""

    responses_per_prompt: int = 4
    """Responses to each prompt; the mean reward of the others is the baseline. At least 2."""


class RLOO(Algorithm):
    """Three roles: the annotations declare them, the launcher creates them."""

    config_class: ClassVar[type] = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        rows = prompts.repeat(self.config.responses_per_prompt)
        rows = rows.join(self.rollout.generate(rows))
        return rows.join(self.reward.score(rows))

    def learn(self, batch: Batch) -> Metrics:
        advantage = ops.leave_one_out(batch["reward"], batch["group"])
        loss = ops.PolicyLoss(advantage="advantage", old_log_probs=self.old_log_probs())
        return self.actor.update(batch.with_columns(advantage=advantage.numpy()), loss=loss)
