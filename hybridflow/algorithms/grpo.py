"""GRPO: rewards normalised within the responses to one prompt replace the critic.

Shao et al. 2024, arXiv:2402.03300, eq. 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm, check_prompts_per_update
from hybridflow.batch import Batch
from hybridflow.errors import Mistake
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of GRPO."""

    responses_per_prompt: int = 8
    """Responses generated to each prompt: the group whose mean is the baseline. At least 2."""
    prompts_per_update: int | None = None
    """Prompts whose responses make one update; divides data.prompts_per_step. Null means all: one on-policy update."""
    epochs: int = 1
    """Passes over the step's rows."""
    clip: tuple[float, float] = (0.2, 0.2)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation; False is Dr. GRPO, arXiv:2503.20783."""
    kl_coefficient: float = 0.001
    """Weight of the k3 KL to the reference policy, added to the loss; 0 needs no reference."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
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
        rows = prompts.repeat(self.config.responses_per_prompt)
        rows = rows.join(self.rollout.generate(rows))
        pending = [self.reward.score.start(rows)]  # overlaps with the calls below where they do not share ranks
        if not self.is_on_policy:
            pending.append(self.actor.log_probs.start(rows))
        if self.config.kl_coefficient:
            pending.append(self.reference.log_probs.start(rows))
        return rows.join(*(call.result() for call in pending))

    def learn(self, batch: Batch) -> Metrics:
        advantage = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=self.config.scale_by_std)
        rows_per_update = (self.config.prompts_per_update or self.run.data.prompts_per_step) * self.config.responses_per_prompt
        parts = self.updates(
            batch.with_columns(advantage=advantage.numpy()), rows_per_update=rows_per_update, epochs=self.config.epochs
        )
        calls = [self.actor.update.start(part, loss=self.policy_loss()) for part in parts]
        return Metrics.merged(call.result() for call in calls)

    @property
    def is_on_policy(self) -> bool:
        """Whether the step makes a single update, for which the policy's own log-probabilities are the old ones."""
        per_update = self.config.prompts_per_update or self.run.data.prompts_per_step
        return self.config.epochs == 1 and per_update == self.run.data.prompts_per_step

    def policy_loss(self) -> ops.PolicyLoss:
        """The clipped surrogate with one advantage for all tokens of a response."""
        return ops.PolicyLoss(
            clip=self.config.clip,
            kl_coefficient=self.config.kl_coefficient,
            kl_estimator="k3",
            entropy_coefficient=self.config.entropy_coefficient,
            advantage="advantage",
            old_log_probs="current" if self.is_on_policy else "log_probs",
            aggregation=self.config.loss_aggregation,
            max_tokens=self.run.data.max_response_tokens,
        )

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        options = run.algorithm.options
        return {"reference"} if isinstance(options, Config) and not options.kl_coefficient else set()

    @classmethod
    def check(cls, run: RunConfig) -> list[Mistake]:
        options = run.algorithm.options
        assert isinstance(options, Config)
        mistakes = check_prompts_per_update(run, options.prompts_per_update or run.data.prompts_per_step)
        if options.responses_per_prompt < 2:
            problem = f"found {options.responses_per_prompt}; a group needs at least 2 responses to have a baseline"
            mistakes.append(Mistake("algorithm.responses_per_prompt", problem))
        return mistakes
