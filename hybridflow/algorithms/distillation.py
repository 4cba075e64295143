"""On-policy distillation: the policy answers, and a teacher says of each token of the answer how likely it would have been.

    A_t = log teacher(y_t) - log old(y_t), the negative reverse KL of the token
    loss = mean over tokens of -min(r_t A_t, clip(r_t) A_t),   r_t = policy / old, which is 1 in a single update
    rewards are measured, not learned from

    prompts --> rollout --> reward --> [actor: old log-probs], teacher --> actor.update x updates

Agarwal et al. 2024, arXiv:2306.13649, eq. 4 and 5 (GKD with lambda 1 and the reverse KL); as a policy gradient, Gu et al. 2024,
arXiv:2306.08543, eq. 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import PolicyOptions, old_column
from hybridflow.batch import Batch
from hybridflow.config.ranges import COUNT
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics
from hybridflow.workers.token_functions import TeacherAdvantages

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions):
    """Options of distillation. `teacher.path` names the teacher, which has the policy's tokenizer."""

    responses_per_prompt: Annotated[int, COUNT] = 4
    """Responses generated to each prompt."""


class Distillation(Algorithm):
    """Roles, dataflow and loss of on-policy distillation."""

    config_class = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    teacher: ReferenceWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        of_teacher = self.teacher.log_probs.start(batch)
        batch = self.with_log_probs(batch).join(of_teacher.result())
        batch = batch.join(self.actor.compute(batch, TeacherAdvantages(old_column(self.config.ratio_over(self.run)))))
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(update.result() for update in updates)

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        errors = super().check(run)
        if run.teacher.path is None:
            errors.append(
                FieldError("teacher.path", "found null, but distillation needs a teacher. Name a folder or hub model")
            )
        if isinstance(run.algorithm.options, Config) and run.algorithm.options.kl_in != "none":
            errors.append(FieldError("algorithm.kl_in", "the teacher takes the place of the reference here. Set none"))
        return errors
