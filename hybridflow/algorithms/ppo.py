"""PPO: a critic's values turn rewards into advantages of every token, and the policy moves within a clip.

    loss of a token = -min(r A, clip(r) A),   r = policy / old,   A = GAE over token rewards less the KL to the reference

    prompts --> rollout --> reward --> critic.values, [actor: old log-probs], reference --> GAE --> critic and actor updates

Schulman et al. 2017, arXiv:1707.06347, eq. 7; KL to a reference in the reward, Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
Where a step makes one update and the reward has no KL in it, the update's own log-probabilities are the old ones: a pass less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import PolicyOptions, old_column
from hybridflow.batch import Batch
from hybridflow.config.choices import Aggregation, KLEstimator, OldLogProbs, Resampling
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics
from hybridflow.workers.token_functions import TokenAdvantages, mean_kl

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.base import Worker
    from hybridflow.workers.critic import CriticWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config(PolicyOptions):
    """Options of PPO."""

    responses_per_prompt: Annotated[int, COUNT] = 1
    """Responses generated to each prompt."""
    gamma: Annotated[float, SHARE] = 1.0
    """Discount per token."""
    gae_lambda: Annotated[float, SHARE] = 1.0
    """Between one-step (0) and whole-response (1) estimates of advantages."""
    whiten_advantages: bool = True
    """Shift and scale the step's advantages to mean 0 and variance 1 over all tokens."""
    value_clip: Annotated[float, POSITIVE] | None = 0.5
    """Values may move this far from those of collection; null for any distance."""
    kl_in: Literal["reward", "loss", "none"] = "reward"
    """Where the KL to the reference counts: in each token's reward, in the loss, or nowhere (no reference is loaded)."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.001
    """Weight of the KL; the start value where it is adaptive."""
    kl_estimator: KLEstimator = "k1"
    """Per-token estimate of the KL; k1 is for the reward, others are for either."""
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive steers the coefficient towards `kl_target`; for kl_in: reward."""
    kl_target: Annotated[float, POSITIVE] = 0.01
    """KL per token, averaged over responses, that the adaptive coefficient aims at, in nats."""
    kl_horizon: Annotated[float, POSITIVE] = 10000.0
    """Rows over which the adaptive coefficient reacts."""
    critic_warmup_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Steps at the start in which only the critic learns."""
    value_loss_aggregation: Aggregation = "token_mean"
    """How the critic's token losses become one number."""
    resampling: Annotated[float, POSITIVE] | Resampling | None = None
    """Learn from as many rows drawn again by their rewards (PF-PPO, arXiv:2409.06957): each as often as this power of its
    absolute reward says; of the best and the worst alone; or the best four times as often as any other."""


class PPO(Algorithm):
    """Roles, dataflow and losses of PPO."""

    config_class = Config
    config: Config
    actor: ActorWorker
    critic: CriticWorker
    rollout: RolloutWorker
    reference: ReferenceWorker
    reward: RewardWorker

    def __init__(self, run: RunConfig, groups: Mapping[str, Worker]):
        super().__init__(run, groups)
        c = self.config
        self.kl = ops.kl_controller(c.kl_controller, c.kl_coefficient, target=c.kl_target, horizon=c.kl_horizon)

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def learn(self, batch: Batch) -> Metrics:
        pending = [self.critic.values.start(batch)]  # roles on different pools overlap
        if self.old_log_probs() == "log_probs":
            pending.append(self.actor.log_probs.start(batch))
        if self.config.kl_in != "none":
            pending.append(self.reference.log_probs.start(batch))
        batch = self.corrected(batch.join(*(call.result() for call in pending)))
        batch = batch.join(self.critic.compute(batch, self.advantages()))
        calls, how, seeds = [], self.config.resampling, (self.run.run.seed, self.step)
        drawn = batch if how is None else batch.select(ops.drawn_by_reward(batch["reward"], how, seeds=seeds))
        for part in self.updates(drawn):
            calls.append(self.critic.update.start(part, loss=self.value_loss()))
            if self.step > self.config.critic_warmup_steps:
                calls.append(self.actor.update.start(part, loss=self.policy_loss()))
        metrics = Metrics.merged([self.update_kl_coefficient(batch), *(call.result() for call in calls)])
        return metrics + Metrics({"critic/explained_variance": ops.explained_variance(metrics, prefix="critic/")})

    def old_log_probs(self) -> OldLogProbs:
        """Denominator of the ratio. The actor's are the current ones, and cost no pass, where the policy is updated once or, in
        the critic's warm-up, not at all; the KL in the reward is needed before."""
        old = self.config.ratio_over(self.run)
        if self.config.old_log_probs == "rollout" or old == "rollout_log_probs" or self.config.corrects_before(self.run):
            return old
        is_settled = self.step <= self.config.critic_warmup_steps or old == "current"
        return "current" if is_settled and self.config.kl_in != "reward" else "log_probs"

    def advantages(self) -> TokenAdvantages:
        """GAE over token rewards that carry the KL penalty, computed where the values are."""
        return TokenAdvantages(
            gamma=self.config.gamma,
            lam=self.config.gae_lambda,
            whiten=self.config.whiten_advantages,
            kl_coefficient=self.kl.coefficient if self.config.kl_in == "reward" else 0.0,
            kl_estimator=self.config.kl_estimator,
            log_probs=old_column(self.old_log_probs()),
        )

    def policy_loss(self) -> ops.PolicyLoss:
        """The clipped surrogate, with the KL to the reference in it where `kl_in` says so."""
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        return replace(loss, old_log_probs=self.old_log_probs())

    def value_loss(self) -> ops.ValueLoss:
        """Half the squared error of the critic."""
        length = self.config.loss_length or self.run.data.max_response_tokens
        return ops.ValueLoss(clip=self.config.value_clip, aggregation=self.config.value_loss_aggregation, max_tokens=length)

    def update_kl_coefficient(self, batch: Batch) -> Metrics:
        """Report the KL to the reference of this step's tokens, and let its mean over rows move the coefficient of the next
        step."""
        if self.config.kl_in == "none":
            return Metrics()
        metrics = Metrics({"kl/mean": mean_kl(batch), "kl/coefficient": self.kl.coefficient})
        self.kl.update(float(batch["kl"].mean()), len(batch))
        return metrics

    def state_dict(self) -> dict[str, float]:
        return self.kl.state_dict()

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.kl.load_state_dict(state)

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        return {"reference"} if isinstance(run.algorithm.options, Config) and run.algorithm.options.kl_in == "none" else set()

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        options = run.algorithm.options
        assert isinstance(options, Config)
        errors = options.errors(run)
        if options.kl_controller == "adaptive" and options.kl_in != "reward":
            errors.append(FieldError("algorithm.kl_controller", "adaptive steers the KL in the reward; set kl_in: reward"))
        return errors
