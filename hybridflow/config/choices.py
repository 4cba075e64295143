"""Choices that options of algorithms and the functions of `ops` have in common. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean", "sequence_mean_of_sums", "sequence_sum", "token_sum"]
"""How token losses become one number: the mean over all tokens (PPO; DAPO, arXiv:2503.14476, eq. 8), the mean over rows of
each row's mean (GRPO, arXiv:2402.03300, eq. 3) or of each row's sum, that sum divided by a constant length (Dr. GRPO,
arXiv:2503.20783, sec. 3.2), or the sum over all tokens."""

KLEstimator = Literal["k1", "k2", "k3", "low_var_kl", "abs", "k1+", "k3+", "low_var_kl+", "abs+"]
"""Per-token estimate of the KL; low_var_kl is k3, at most 10. One with a plus has the value of the one without and the gradient
of k2 (straight-through)."""

OldLogProbs = Literal["log_probs", "rollout_log_probs", "current"]
"""Denominator of the probability ratio: as computed before the updates, as the engine returned them, or the present ones."""

Resampling = Literal["best_and_worst", "best"]
"""Which rows are drawn again for the updates."""

OfTokens = Literal["token_k1", "token_k2", "token_k3"]
OfSums = Literal["sequence_sum_k1", "sequence_sum_k2", "sequence_sum_k3"]
OfMeans = Literal["sequence_mean_k1", "sequence_mean_k2", "sequence_mean_k3"]
OfLargest = Literal["sequence_max_k1", "sequence_max_k2", "sequence_max_k3"]
Statistic = OfTokens | OfSums | OfMeans | OfLargest
"""Distance of engine and trainer at a token, in nats, or its sum, mean or largest over a response: k1 = log(engine / trainer),
k2 = k1^2 / 2, k3 = exp(-k1) - 1 + k1."""


@dataclass(frozen=True)
class Rejection:
    """Tokens, or whole responses, that are taken out of a step for being too far from what the trainer would have sampled."""

    statistic: Statistic
    """What is compared with the bounds."""
    most: float
    """Above it they are out."""
    least: float | None = None
    """Below it they are out; null for no such bound."""

    def __post_init__(self) -> None:
        if self.least is not None and self.least > self.most:
            raise ValueError(f"least={self.least:g} is above most={self.most:g}, and nothing is left. Exchange them")
        if self.most < 0 and not self.statistic.endswith("k1"):
            raise ValueError(f"most={self.most:g}, but {self.statistic} is never below 0, and nothing is left. Set it above")
