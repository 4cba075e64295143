"""Correction for tokens that another program sampled than the one that trains: importance weights and rejection.

B rows, T tokens of all rows end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridflow.config.choices import Rejection
from hybridflow.ops.kl import MAX_LOG_RATIO, kl_estimate
from hybridflow.ops.reduce import TokenMetric, repeat_rows, row_means, row_sums

__all__ = ["ImportanceCorrection", "importance_correction"]


def importance_correction(
    cap: float | None,
    level: Literal["token", "sequence"] = "token",
    mask: tuple[float, float] | None = None,
    rejections: Sequence[Rejection] = (),
) -> ImportanceCorrection | None:
    """The correction that options of an algorithm describe; None where they ask for none."""
    if cap is None and mask is None and not rejections:
        return None
    below, above = mask or (None, None)
    return ImportanceCorrection(
        level=level,
        cap=math.inf if cap is None else cap,
        mask_below=below,
        mask_above=above,
        rejections=tuple(rejections),
        is_weighing=cap is not None or mask is not None,
    )


@dataclass(frozen=True, kw_only=True)
class ImportanceCorrection:
    """Weights policy / engine for the policy loss, bounded above.

    The engine's kernels and precision differ from the trainer's, so that its samples are off-policy even for equal weights.
    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training": min(policy / engine, cap).

    Example:
        >>> correction = ImportanceCorrection(cap=2.0, mask_below=0.1)
        >>> old_T, rollout_T = torch.tensor([-1.0, -1.0, -5.0]), torch.tensor([-1.0, -3.0, -1.0])  # ratios 1, e^2 and e^-4
        >>> correction.weights(old_T, rollout_T, torch.tensor([3]))[0]
        tensor([1., 2., 0.])
    """

    level: Literal["token", "sequence"] = "token"
    """Ratio of each token's probability, or of the whole response's for all its tokens."""
    cap: float = 2.0
    """Larger weights become this."""
    mask_below: float | None = None
    """Tokens (at level `sequence`, responses) with a ratio below this count nothing; null for none."""
    mask_above: float | None = None
    """The same for ratios above this, before the cap."""
    rejections: tuple[Rejection, ...] = ()
    """Tokens that are outside of any of these have weight 0."""
    is_weighing: bool = True
    """False: weights are 0 and 1, by `rejections` alone."""

    @torch.no_grad()
    def weights(self, old_T: Tensor, rollout_T: Tensor, lengths_B: Tensor) -> tuple[Tensor, dict[str, TokenMetric]]:
        """Weights [T] without gradient, with their mean and the shares capped and masked.

        `old_T` are the trainer's log-probabilities under the weights that sampled, `rollout_T` the engine's.
        """
        log_ratio_T = old_T - rollout_T
        is_masked_T = ~self.kept(old_T, rollout_T, lengths_B)
        if self.level == "sequence":
            log_ratio_T = repeat_rows(row_sums(log_ratio_T, lengths_B), lengths_B, num_tokens=len(log_ratio_T))
        ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() if self.is_weighing else torch.ones_like(log_ratio_T)
        is_outside_T = torch.zeros_like(is_masked_T)
        if self.mask_below is not None:
            is_outside_T |= ratio_T < self.mask_below
        if self.mask_above is not None:
            is_outside_T |= ratio_T > self.mask_above
        weights_T = ratio_T.clamp(max=self.cap).masked_fill(is_outside_T, 0.0)
        weights_T = weights_T.masked_fill(is_masked_T, 0.0)
        return weights_T, {
            "correction_weight": TokenMetric.mean(weights_T),
            "correction_capped": TokenMetric.mean(ratio_T > self.cap),
            "correction_masked": TokenMetric.mean(is_masked_T | is_outside_T),
        }

    @torch.no_grad()
    def kept(self, old_T: Tensor, rollout_T: Tensor, lengths_B: Tensor) -> Tensor:
        """Of each token whether it is within the bounds of all `rejections`: bool, shape [T].

        Example:
            >>> far = ImportanceCorrection(rejections=(Rejection("sequence_max_k1", most=1.0),))
            >>> engine_T, trainer_T = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -3.0, -1.5])
            >>> far.kept(trainer_T, engine_T, torch.tensor([2, 1]))  # differences 0 and 2, and 0.5
            tensor([False, False,  True])
        """
        is_kept_T = torch.ones_like(old_T, dtype=torch.bool)
        log_ratio_T = (old_T - rollout_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        for rejection in self.rejections:
            level, _, kind = rejection.statistic.rpartition("_")
            statistic_T = _DISTANCES[kind](log_ratio_T)
            if level in _OF_ROWS:
                of_rows_B = _OF_ROWS[level](statistic_T, lengths_B)
                statistic_T = repeat_rows(of_rows_B, lengths_B, num_tokens=len(statistic_T))
            is_kept_T &= statistic_T <= rejection.most
            if rejection.least is not None:
                is_kept_T &= statistic_T >= rejection.least
        return is_kept_T

    @torch.no_grad()
    def row_shares(self, old_T: Tensor, rollout_T: Tensor, lengths_B: Tensor) -> Tensor:
        """At each token the share of its row that `kept` leaves, shape [T]: a row's mean over this is one of the tokens left.
        1 in rows of which nothing is left.
        """
        if not self.rejections:
            return torch.ones_like(old_T)
        share_B = row_means(self.kept(old_T, rollout_T, lengths_B).to(old_T.dtype), lengths_B)
        return repeat_rows(torch.where(share_B > 0, share_B, 1.0), lengths_B, num_tokens=len(old_T))


def _row_largest(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    return torch.segment_reduce(values_T, "max", lengths=lengths_B, unsafe=True, initial=-math.inf)


_DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": torch.neg,
    "k2": lambda log_ratio_T: 0.5 * log_ratio_T.square(),
    "k3": lambda log_ratio_T: kl_estimate(torch.zeros_like(log_ratio_T), log_ratio_T, "k3"),
}
_OF_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sequence_sum": row_sums,
    "sequence_mean": row_means,
    "sequence_max": _row_largest,
}
