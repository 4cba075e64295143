"""GRPO: rewards normalised within the responses to one prompt replace the critic.

Shao et al. 2024, arXiv:2402.03300, eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm, PolicyOptions, check_prompts_per_update
from hybridflow.batch import Batch
from hybridflow.config.ranges import AT_LEAST_TWO, NOT_NEGATIVE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions):
    """Options of GRPO."""

    responses_per_prompt: Annotated[int, AT_LEAST_TWO] = 8
    """Responses generated to each prompt: the group whose mean is the baseline."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation; False is Dr. GRPO, arXiv:2503.20783."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.001
    """Weight of the k3 KL to the reference policy, added to the loss; 0 needs no reference."""
    loss_aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = "sequence_mean"
    """How token losses become one number."""


class GRPO(Algorithm):
    """Roles, dataflow and loss of GRPO."""

    config_class = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reference: ReferenceWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        pending = []  # roles on different pools overlap
        if self.config.ratio_over(self.run) == "log_probs":
            pending.append(self.actor.log_probs.start(batch))
        if self.config.kl_coefficient:
            pending.append(self.reference.log_probs.start(batch))
        advantage = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=self.config.scale_by_std)
        batch = batch.join(*(call.result() for call in pending)).with_columns(advantage=advantage.numpy())
        parts = self.updates(batch, self.config.prompts_per_update, epochs=self.config.epochs)
        calls = [self.actor.update.start(part, loss=self.policy_loss()) for part in parts]
        return Metrics.merged(call.result() for call in calls)

    def policy_loss(self) -> ops.PolicyLoss:
        """The clipped surrogate with one advantage for all tokens of a response."""
        return ops.PolicyLoss(
            clip=self.config.clip,
            kl_coefficient=self.config.kl_coefficient,
            kl_estimator="k3",
            entropy_coefficient=self.config.entropy_coefficient,
            advantage="advantage",
            old_log_probs=self.config.ratio_over(self.run),
            dual_clip=self.config.ratio_bound(self.run),
            aggregation=self.config.loss_aggregation,
            max_tokens=self.run.data.max_response_tokens,
            correction=self.config.importance_correction(self.run),
        )

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        options = run.algorithm.options
        return {"reference"} if isinstance(options, Config) and not options.kl_coefficient else set()

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        options = run.algorithm.options
        assert isinstance(options, Config)
        return check_prompts_per_update(run, options.prompts_per_update)
