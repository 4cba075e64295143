"""PPO-ptx: PPO whose updates also raise the likelihood of other text, so that the policy forgets less of what it knew.

    loss = mean over sampled tokens of -min(r A, clip(r) A) - gamma mean over tokens of the text of log p
    A = GAE over token rewards less beta KL to the reference

    prompts --> rollout --> reward --> critic.values, actor and reference log-probs --> GAE --> critic.update
                                            text --> pretraining -------------------------------> actor.update

Ouyang et al. 2022, arXiv:2203.02155, eq. 2, whose gamma is 27.8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.mixing import mixed
from hybridflow.algorithms.options import PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.choices import KLEstimator
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.critic import CriticWorker
    from hybridflow.workers.pretraining import PretrainingWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions):
    """Options of PPO-ptx."""

    pretraining_files: tuple[str, ...] = ()
    """Parquet files with columns `prompt` and `response`: the text is the response, behind its prompt."""
    pretraining_coefficient: Annotated[float, NOT_NEGATIVE] = 27.8
    """Weight of the text's mean log-probability, gamma."""
    pretraining_rows: Annotated[int, COUNT] | None = None
    """Rows of text in each update; null means as many as it has responses."""
    responses_per_prompt: Annotated[int, COUNT] = 1
    """Responses generated to each prompt."""
    gae_lambda: Annotated[float, SHARE] = 0.95
    """Between one-step (0) and whole-response (1) estimates of advantages."""
    value_clip: Annotated[float, POSITIVE] | None = 0.2
    """Values may move this far from those of collection; null for any distance."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the KL to the reference counts: in each token's reward, in the loss, or nowhere (no reference is loaded)."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.02
    """Weight of the KL, beta."""
    kl_estimator: KLEstimator = "k1"
    """Per-token estimate of the KL; k1 is for the reward, others are for either."""
    loss_aggregation: Literal["token_mean"] = "token_mean"
    """How token losses become one number: sampled tokens and those of the text each by their own mean."""


class PPOPtx(Algorithm):
    """Roles, dataflow and losses of PPO-ptx."""

    config_class = Config
    config: Config
    actor: ActorWorker
    critic: CriticWorker
    rollout: RolloutWorker
    reference: ReferenceWorker
    reward: RewardWorker
    pretraining: PretrainingWorker

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        values = self.critic.values.start(batch)
        batch = self.with_log_probs(batch).join(values.result())
        batch = self.with_returns(batch, lam=self.config.gae_lambda, whiten=True)
        of_policy = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        loss = ops.PretrainingLoss(policy=of_policy, coefficient=self.config.pretraining_coefficient)
        parts, calls, temperature = self.updates(batch), [], self.run.rollout.temperature
        for number, part in enumerate(parts):
            count = self.config.pretraining_rows or len(part)
            text = self.pretraining.next_rows(self.step, number, len(parts), count)
            calls.append(self.critic.update.start(part, loss=ops.ValueLoss(clip=self.config.value_clip)))
            calls.append(
                self.actor.update.start(mixed(part, text, self.actor, of_policy.columns, temperature=temperature), loss=loss)
            )
        return Metrics.merged(call.result() for call in calls)

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        errors, options = super().check(run), run.algorithm.options
        if isinstance(options, Config) and not options.pretraining_files:
            problem = "is empty, but ppo_ptx mixes text into its updates. Name Parquet files with `prompt` and `response`"
            errors.append(FieldError("algorithm.pretraining_files", problem))
        return errors
