"""Correction for tokens that another program sampled than the one that trains: truncated and masked importance sampling.

B rows, T tokens of all rows end to end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridflow.ops.kl import MAX_LOG_RATIO
from hybridflow.ops.reduce import TokenMetric, repeat_rows, row_sums


def importance_correction(
    cap: float | None, level: Literal["token", "sequence"] = "token", mask: tuple[float, float] | None = None
) -> ImportanceCorrection | None:
    """The correction that options of an algorithm describe; None where neither `cap` nor `mask` is set."""
    if cap is None and mask is None:
        return None
    below, above = mask or (None, None)
    return ImportanceCorrection(level=level, cap=math.inf if cap is None else cap, mask_below=below, mask_above=above)


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

    @torch.no_grad()
    def weights(self, old_T: Tensor, rollout_T: Tensor, lengths_B: Tensor) -> tuple[Tensor, dict[str, TokenMetric]]:
        """Weights [T] without gradient, with their mean and the shares capped and masked.

        `old_T` are the trainer's log-probabilities under the weights that sampled, `rollout_T` the engine's.
        """
        log_ratio_T = old_T - rollout_T
        if self.level == "sequence":
            log_ratio_T = repeat_rows(row_sums(log_ratio_T, lengths_B), lengths_B, num_tokens=len(log_ratio_T))
        ratio_T = log_ratio_T.clamp(max=MAX_LOG_RATIO).exp()
        is_masked_T = torch.zeros_like(ratio_T, dtype=torch.bool)
        if self.mask_below is not None:
            is_masked_T |= ratio_T < self.mask_below
        if self.mask_above is not None:
            is_masked_T |= ratio_T > self.mask_above
        weights_T = ratio_T.clamp(max=self.cap).masked_fill(is_masked_T, 0.0)
        return weights_T, {
            "correction_weight": TokenMetric.mean(weights_T),
            "correction_capped": TokenMetric.mean(ratio_T > self.cap),
            "correction_masked": TokenMetric.mean(is_masked_T),
        }
