"""Options that algorithms share, to derive a `Config` from, and the loss that they describe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from hybridflow import ops
from hybridflow.algorithms.importance import ImportanceOptions
from hybridflow.config.choices import Aggregation, KLEstimator, OldLogProbs
from hybridflow.config.ranges import ABOVE_ONE, COUNT, NOT_NEGATIVE
from hybridflow.errors import FieldError

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.ops.surrogates import Surrogate

Clip = tuple[Annotated[float, NOT_NEGATIVE], Annotated[float, NOT_NEGATIVE]]


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The `Config` of an algorithm without options."""


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(ImportanceOptions):
    """To inherit from: how a step's rows become updates of a policy, and what its loss is made of beside the surrogate."""

    has_ratio: ClassVar[bool] = True
    """Whether the surrogate contains the probability ratio and bounds it, so that over the engine's log-probabilities it is the
    importance weight. Without, such weights multiply the loss."""
    rewrites_rewards: ClassVar[bool] = False
    """Whether a row's reward becomes another number before it is given to tokens, so that turns cannot have their own."""

    old_log_probs: Literal["actor", "rollout"] = "actor"
    """Denominator of the ratio: the actor's, computed before the updates only where a step has several or something needs
    them, or as the engine returned them (saves that forward pass)."""
    prompts_per_update: Annotated[int, COUNT] | None = None
    """Prompts whose responses make one update; divides data.prompts_per_step. Null means all: one update per epoch."""
    epochs: Annotated[int, COUNT] = 1
    """Passes over the step's rows."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    kl_in: Literal["reward", "loss", "none"] = "none"
    """Where the KL to the reference counts: in the reward, in the loss, or nowhere (no reference is loaded)."""
    kl_coefficient: Annotated[float, NOT_NEGATIVE] = 0.001
    """Weight of the KL."""
    kl_estimator: KLEstimator = "k3"
    """Per-token estimate of the KL. In a loss only the gradient of k2 is that of the KL on average; one with a plus has the
    value of the one without and the gradient of k2 (straight-through)."""
    loss_aggregation: Aggregation = "token_mean"
    """How token losses become one number: mean over tokens; mean over rows of their means (sequence_mean), of their sums, or of
    their sums over `loss_length` (sequence_sum); or the plain sum."""
    loss_length: Annotated[int, COUNT] | None = None
    """The constant that sequence_sum divides by; null means data.max_response_tokens."""

    def makes_one_update(self, run: RunConfig) -> bool:
        """Whether a step makes a single update: then no log-probabilities need to be computed before it."""
        return self.epochs == 1 and self.prompts_per_update in (None, run.data.prompts_per_step)

    def ratio_over(self, run: RunConfig) -> OldLogProbs:
        """Denominator of the ratio. Of a single update the present ones, or, where older weights may have sampled, the engine's
        own: the ratio then is the importance weight. Of several updates, without a cap, for a KL in the reward, or for what
        concerns the step as a whole (rejections, normalised weights), those computed before the first."""
        if self.old_log_probs == "rollout":
            return "rollout_log_probs" if self.is_over_ratio else "current"
        if self.rejections or self.importance_normalized or not self.makes_one_update(run):
            return "log_probs"
        if run.loop.max_staleness and self.cap(run) is not None:
            return "rollout_log_probs" if self.is_over_ratio else "current"
        return "log_probs" if run.loop.max_staleness or self.penalises_reward else "current"

    def corrects_before(self, run: RunConfig) -> bool:
        """Whether importance weights and rejections are of the step as a whole, and computed before its updates."""
        return bool(self.rejections or self.importance_normalized) and self.ratio_over(run) == "log_probs"

    def ratio_bound(self, run: RunConfig) -> float | None:
        """Where the ratio is over the engine's log-probabilities, an importance weight, the bound of such weights holds for
        it."""
        return self.cap(run) if self.ratio_over(run) == "rollout_log_probs" else None

    @property
    def is_over_ratio(self) -> bool:
        """`has_ratio`, of the surrogate that is chosen."""
        return self.has_ratio

    @property
    def penalises_reward(self) -> bool:
        """Whether a KL is taken from rewards."""
        return self.kl_in == "reward" and self.kl_coefficient > 0

    @property
    def needs_reference(self) -> bool:
        """Whether a KL counts anywhere."""
        return self.kl_in != "none" and self.kl_coefficient > 0

    def errors(self, run: RunConfig) -> list[FieldError]:
        """Mistakes in these options."""
        is_of_engine = self.old_log_probs == "rollout"
        errors = check_prompts_per_update(run, self.prompts_per_update) + self.errors_of_mean(run, is_of_engine=is_of_engine)
        if self.rewrites_rewards and run.environment.is_set and run.environment.rewards == "turn":
            problem = "found turn, but this algorithm compares episodes. Set episode, or algorithm=reinforce_plus_plus or ppo"
            errors.append(FieldError("environment.rewards", problem, related=("algorithm.name",)))
        if isinstance(self.importance_cap, float) and is_of_engine and self.ratio_over(run) == "rollout_log_probs":
            errors.append(FieldError("algorithm.old_log_probs", "importance_cap weighs the actor's: set actor"))
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            errors.append(
                FieldError("algorithm.kl_estimator", "k1 has a gradient of zero on average in a loss. Use k2, k3 or k1+")
            )
        return errors

    def policy_loss(self, run: RunConfig, surrogate: Surrogate, *, advantage: str = "advantage") -> ops.PolicyLoss:
        """The loss that these options describe around a surrogate, with one advantage per row or, in column `advantages`, one
        per token."""
        correction, before = self.importance_correction(run), self.corrects_before(run)
        return ops.PolicyLoss(
            surrogate=surrogate,
            advantage=advantage,
            entropy_coefficient=self.entropy_coefficient,
            kl_coefficient=self.kl_coefficient if self.kl_in == "loss" else 0.0,
            kl_estimator=self.kl_estimator,
            old_log_probs=self.ratio_over(run),
            aggregation=self.loss_aggregation,
            max_tokens=self.loss_length or run.data.max_response_tokens,
            correction=None if before else correction,
            weight="importance_weights" if before and correction is not None and correction.is_weighing else None,
        )


@dataclass(frozen=True, kw_only=True)
class PolicyOptions(UpdateOptions):
    """To inherit from: updates of a policy with a clipped ratio."""

    clip: Clip = (0.2, 0.2)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    dual_clip: Annotated[float, ABOVE_ONE] | None = None
    """Bound of the ratio where the advantage is negative; null for none."""
    surrogate: Literal["clipped_ratio", "policy_gradient"] = "clipped_ratio"
    """The clipped ratio times the advantage; or the advantage times the log-probability alone (REINFORCE), which with
    `importance_cap` has the weight of its token."""

    @property
    def is_over_ratio(self) -> bool:
        return self.surrogate == "clipped_ratio"

    def clipped(self, run: RunConfig) -> Surrogate:
        """The clipped surrogate; where the ratio is an importance weight, with the bound of such weights if no other is set."""
        if not self.is_over_ratio:
            return ops.policy_gradient
        return partial(ops.clipped, clip=self.clip, dual_clip=self.dual_clip or self.ratio_bound(run))


@dataclass(frozen=True, kw_only=True)
class GroupOptions(UpdateOptions):
    """To inherit from, beside `PolicyOptions` where the ratio is clipped: several responses to each prompt."""

    responses_per_prompt: Annotated[int, COUNT] = 8
    """Responses generated to each prompt: the group that each is compared with. One alone keeps its reward, as with no
    baseline."""
    dynamic_sampling: bool = False
    """Refuse prompts whose responses all have the same reward (DAPO, arXiv:2503.14476, eq. 11)."""
    max_rounds: Annotated[int, COUNT] = 10
    """Once so many times a step's prompts were drawn for it, no further prompt is refused."""
    overlong_buffer_tokens: Annotated[int, COUNT] | None = None
    """Over the last so many tokens before data.max_response_tokens the punishment rises to `overlong_penalty`; null means a
    fifth of them."""
    overlong_penalty: Annotated[float, NOT_NEGATIVE] = 0.0
    """Taken from the reward of a response that is as long as may be (DAPO, eq. 13); 0 for none."""

    def errors(self, run: RunConfig) -> list[FieldError]:
        errors = super().errors(run)
        if self.dynamic_sampling and self.responses_per_prompt == 1:
            problem = "refuses groups of equal rewards, and a group of one is one. Set algorithm.responses_per_prompt=8"
            errors.append(FieldError("algorithm.dynamic_sampling", problem, related=("algorithm.responses_per_prompt",)))
        return errors

    def length_penalty(self, run: RunConfig, tokens_B: Any) -> Any:  # arrays of numbers, one per row
        """What to add to rewards, 0 or below."""
        limit = run.data.max_response_tokens
        buffer = self.overlong_buffer_tokens or max(1, limit // 5)
        return self.overlong_penalty * ops.overlong_penalty(tokens_B, max_tokens=limit, buffer_tokens=buffer).numpy()


def check_prompts_per_update(run: RunConfig, prompts_per_update: int | None) -> list[FieldError]:
    """Mistakes where a step's prompts cannot be split into updates of `prompts_per_update` prompts; None is all of them."""
    prompts_per_step = run.data.prompts_per_step
    if prompts_per_update is None or prompts_per_step % prompts_per_update == 0:
        return []
    if prompts_per_update > prompts_per_step:
        problem = f"found {prompts_per_update}, more than the {prompts_per_step} prompts of data.prompts_per_step"
        advice = "Lower the one or raise the other"
    else:
        problem = f"found {prompts_per_update}, which does not divide data.prompts_per_step={prompts_per_step}"
        advice = f"Use one of {', '.join(str(n) for n in range(1, prompts_per_step + 1) if prompts_per_step % n == 0)}"
    return [FieldError("algorithm.prompts_per_update", f"{problem}. {advice}", related=("data.prompts_per_step",))]


def old_column(old: OldLogProbs) -> str:
    """The column with the policy's log-probabilities before the updates: the engine's, where the actor has computed none."""
    return "log_probs" if old == "log_probs" else "rollout_log_probs"
