"""Losses, as values that the controller sends to the workers: a worker calls one on each microbatch.

B rows, T response tokens of all rows of the microbatch end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from hybridflow.config.choices import Aggregation, KLEstimator, OldLogProbs
from hybridflow.ops.correction import ImportanceCorrection
from hybridflow.ops.kl import kl_estimate
from hybridflow.ops.reduce import TokenMetric, repeat_rows, row_means
from hybridflow.ops.surrogates import PolicyTokens, Surrogate, clipped

__all__ = ["Loss", "NextTokenLoss", "PolicyLoss", "PretrainingLoss", "TokenBatch", "ValueLoss", "explained_variance"]


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What a loss is computed from: one microbatch."""

    log_probs_T: Tensor | None = None
    """The policy's log-probabilities in nats, with gradient; None for a critic."""
    values_T: Tensor | None = None
    """The critic's values, with gradient; None for a policy."""
    entropy_T: Tensor | None = None
    """In nats, with gradient where the loss says `needs_entropy`."""
    columns: Mapping[str, Tensor]
    """The batch columns that the loss asked for, each of shape [T]; per-row columns repeated over the row's tokens."""
    lengths_B: Tensor
    """Response tokens of each row, on the device of the rest."""
    weights_T: Tensor
    """What `token_weights` gave for these rows."""


class Loss(Protocol):
    """What a worker's `update` takes. Must pickle. Whoever inherits from it says what differs."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Batch columns that it reads."""
        return ()

    @property
    def needs_entropy(self) -> bool:
        """Whether `TokenBatch.entropy_T` must be there."""
        return False

    @property
    def aggregation(self) -> Aggregation:
        """How token losses become one number."""
        return "token_mean"

    @property
    def max_tokens(self) -> int | None:
        """The constant length of aggregation `sequence_sum`."""
        return None

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        """This microbatch's part of the loss of the update, shape [], and metrics."""
        ...


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A surrogate of the policy's objective, less an entropy bonus, plus the KL to the reference.

    The surrogate is the clipped one of PPO where none is given.

    Example:
        >>> PolicyLoss(clip=(0.2, 0.28), advantage="advantage", kl_coefficient=0.001).columns
        ('advantage', 'log_probs', 'reference_log_probs')
        >>> from hybridflow.ops.surrogates import sequence_ratio
        >>> gspo = PolicyLoss(surrogate=partial(clipped, clip=(3e-4, 4e-4), ratio=sequence_ratio), aggregation="sequence_mean")
    """

    clip: tuple[float, float] = (0.2, 0.2)
    """Where no surrogate is given: the probability ratio is kept within [1 - low, 1 + high]."""
    dual_clip: float | None = None
    """Likewise: where the advantage is negative, the ratio counts at most this; above 1. None for no bound."""
    surrogate: Surrogate | None = None
    """The loss of each token: a function of `PolicyTokens` that pickles, as those of ops/surrogates.py do."""
    entropy_coefficient: float = 0.0
    kl_coefficient: float = 0.0
    kl_estimator: KLEstimator = "k3"
    advantage: str = "advantages"
    """Column with one advantage per token, or with one per row (`advantage`)."""
    old_log_probs: OldLogProbs = "log_probs"
    """Denominator of the ratio: a column, or the present log-probabilities themselves, for the only update of a step whose
    rows were sampled with the present weights, or are weighed by `correction`."""
    aggregation: Aggregation = "token_mean"
    max_tokens: int | None = None
    correction: ImportanceCorrection | None = None
    """Weights between the old log-probabilities and the engine's; None for none. Where the ratio is over the engine's, it is
    such a weight itself, and only the mask applies."""
    weight: str | None = None
    """Column with a weight for the surrogate of each token, without `correction`; None for 1."""
    pools_weights: bool = False
    """Whether the tokens of a row all have the geometric mean of their weights."""

    @property
    def columns(self) -> tuple[str, ...]:
        names: list[str] = [self.advantage]
        names += [self.old_log_probs] if self.old_log_probs != "current" else []
        names += ["reference_log_probs"] if self.kl_coefficient else []
        names += ["rollout_log_probs"] if self.correction else []
        names += [self.weight] if self.weight else []
        return tuple(dict.fromkeys(names))

    @property
    def needs_entropy(self) -> bool:
        return self.entropy_coefficient != 0.0

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        assert batch.log_probs_T is not None, "a policy loss needs log-probabilities"
        log_probs_T, weights_T = batch.log_probs_T, batch.weights_T
        old_T = log_probs_T.detach() if self.old_log_probs == "current" else batch.columns[self.old_log_probs]
        surrogate = self.surrogate or partial(clipped, clip=self.clip, dual_clip=self.dual_clip)
        advantage_T = batch.columns[self.advantage]
        loss_T, metrics = surrogate(
            PolicyTokens(log_probs_T=log_probs_T, old_T=old_T, advantage_T=advantage_T, lengths_B=batch.lengths_B)
        )
        if self.correction is not None:
            # Over the engine's own log-probabilities the ratio is the weight already: what is left of the correction is its
            # mask.
            is_in_ratio = self.old_log_probs == "rollout_log_probs"
            corrected_T = log_probs_T.detach() if is_in_ratio else old_T
            correction_T, correction_metrics = self.correction.weights(
                corrected_T, batch.columns["rollout_log_probs"], batch.lengths_B
            )
            loss_T = loss_T * ((correction_T > 0) if is_in_ratio else self._pooled(correction_T, batch.lengths_B))
            if self.aggregation == "sequence_mean":  # as in verl, whose other aggregations divide by what was sampled
                loss_T = loss_T / self.correction.row_shares(corrected_T, batch.columns["rollout_log_probs"], batch.lengths_B)
            metrics |= correction_metrics
        if self.weight is not None:
            loss_T = loss_T * self._pooled(batch.columns[self.weight], batch.lengths_B)
        metrics["policy_loss"] = TokenMetric.mean(loss_T, weights_T)
        metrics["negative_log_prob"] = TokenMetric.mean(-log_probs_T)
        if batch.entropy_T is not None:
            metrics["entropy"] = TokenMetric.mean(batch.entropy_T)
        if self.entropy_coefficient:
            assert batch.entropy_T is not None, "an entropy bonus needs entropies"
            loss_T = loss_T - self.entropy_coefficient * batch.entropy_T
        if self.kl_coefficient:
            kl_T = kl_estimate(log_probs_T, batch.columns["reference_log_probs"], self.kl_estimator)
            loss_T = loss_T + self.kl_coefficient * kl_T
            metrics["kl_to_reference"] = TokenMetric.mean(kl_T)
        metrics["loss"] = TokenMetric.mean(loss_T, weights_T)
        return (loss_T * weights_T).sum(), metrics

    def _pooled(self, weights_T: Tensor, lengths_B: Tensor) -> Tensor:
        if not self.pools_weights:
            return weights_T
        mean_B = row_means((weights_T + 1e-10).log(), lengths_B)
        return repeat_rows(mean_B.exp(), lengths_B, num_tokens=len(weights_T))


@dataclass(frozen=True, kw_only=True)
class ValueLoss(Loss):
    """Half the squared error of the critic, the larger of the one as it is and the one with the value's change clipped.

    Not in a paper's equation: the reference implementation of PPO (openai/baselines, ppo2); without the clip
    arXiv:1707.06347, eq. 9.
    """

    clip: float | None = 0.5
    """Values may move this far from those of collection; None for any distance."""
    aggregation: Aggregation = "token_mean"
    max_tokens: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("returns",) if self.clip is None else ("returns", "values")

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        assert batch.values_T is not None, "a value loss needs values"
        values_T, returns_T = batch.values_T, batch.columns["returns"]
        error_T = returns_T - values_T
        loss_T = 0.5 * error_T.square()
        metrics = {
            "values": TokenMetric.mean(values_T),
            "returns": TokenMetric.mean(returns_T),
            "returns_sq": TokenMetric.mean(returns_T.double().square()),
            "value_error": TokenMetric.mean(error_T),
            "value_error_sq": TokenMetric.mean(error_T.double().square()),
        }
        if self.clip is not None:
            old_T = batch.columns["values"]
            clipped_T = old_T + (values_T - old_T).clamp(-self.clip, self.clip)
            clipped_loss_T = 0.5 * (clipped_T - returns_T).square()
            # Rounding alone can make the clipped loss the larger one, so the distance is asked as well.
            is_clipped_T = (clipped_loss_T > loss_T) & ((values_T - old_T).abs() > self.clip)
            metrics["clip_fraction"] = TokenMetric.mean(is_clipped_T)
            loss_T = torch.maximum(loss_T, clipped_loss_T)
        metrics["loss"] = TokenMetric.mean(loss_T, batch.weights_T)
        return (loss_T * batch.weights_T).sum(), metrics


def explained_variance(metrics: Mapping[str, float], prefix: str = "") -> float:
    """1 - Var(returns - values) / Var(returns) over everything that `metrics` of a `ValueLoss` have counted.

    1 is a perfect critic, 0 one that knows the mean only. `prefix` stands before the metrics' names, such as `critic/`. NaN
    where the returns vary by no more than float32 rounding, or by less than 1e-4 (standard deviation).
    """
    of = {name: metrics[f"{prefix}{name}"] for name in ("returns", "returns_sq", "value_error", "value_error_sq")}
    variance = of["returns_sq"] - of["returns"] ** 2
    if variance <= max(1e-6 * of["returns_sq"], 1e-8):
        return float("nan")
    return 1.0 - (of["value_error_sq"] - of["value_error"] ** 2) / variance


@dataclass(frozen=True, kw_only=True)
class NextTokenLoss(Loss):
    """The mean negative log-probability of the dataset's tokens: supervised fine-tuning."""

    aggregation: Aggregation = "token_mean"
    max_tokens: int | None = None

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        assert batch.log_probs_T is not None, "a next-token loss needs log-probabilities"
        loss_T = -batch.log_probs_T
        return (loss_T * batch.weights_T).sum(), {"loss": TokenMetric.mean(loss_T, batch.weights_T)}


@dataclass(frozen=True, kw_only=True)
class PretrainingLoss(Loss):
    """A policy's loss on the rows that it has sampled, and the negative log-probability of the text in the others.

    The per-row columns `policy_weight` and `text_weight` are 0 for rows of the other kind; for its own, all tokens of the
    update over those of this kind, so that each kind has its own mean. Ouyang et al. 2022, arXiv:2203.02155, eq. 2.
    """

    policy: PolicyLoss
    coefficient: float
    """Weight of the text, gamma of the paper."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.policy.columns, "policy_weight", "text_weight")

    @property
    def needs_entropy(self) -> bool:
        return self.policy.needs_entropy

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        assert batch.log_probs_T is not None, "a loss of text needs log-probabilities"
        log_probs_T, columns = batch.log_probs_T, batch.columns
        is_text_T = columns["text_weight"] > 0
        # Text has no columns of the policy's: its own log-probabilities in their place keep every ratio finite.
        read = {name: torch.where(is_text_T, log_probs_T.detach(), columns[name]) for name in self.policy.columns}
        weights_T = batch.weights_T * columns["policy_weight"]
        loss, metrics = self.policy(replace(batch, columns=read, weights_T=weights_T))
        text_T = batch.weights_T * columns["text_weight"]
        metrics["pretraining_loss"] = TokenMetric.mean(-log_probs_T, text_T)
        return loss - self.coefficient * (log_probs_T * text_T).sum(), metrics
