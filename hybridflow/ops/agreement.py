"""How far the engine's log-probabilities are from the trainer's, for the same tokens under the same weights.

T response tokens. Everything in float32 and in nats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Agreement:
    """Over tokens; all zero where there are none."""

    mean: float
    """Mean of |difference|."""
    p99: float
    """99th percentile of |difference|: at least 99 % of tokens differ by this or less."""
    max: float
    """Maximum of |difference|."""
    k3: float
    """Mean k3 estimate of KL(engine || trainer), Schulman 2020: exp(d) - 1 - d with d = trainer - engine."""
    num_tokens: int


@torch.no_grad()
def log_prob_agreement(rollout_log_probs_T: torch.Tensor, log_probs_T: torch.Tensor) -> Agreement:
    """Compare the engine's with the trainer's log-probabilities: any float dtype, shape [T]. Waits for the device once."""
    num_tokens = rollout_log_probs_T.numel()
    assert log_probs_T.shape == rollout_log_probs_T.shape, "both are about the same tokens"
    if num_tokens == 0:
        return Agreement(0.0, 0.0, 0.0, 0.0, 0)
    difference_T = log_probs_T.float() - rollout_log_probs_T.float()
    distance_T = difference_T.abs()
    rank_of_p99 = -(-99 * num_tokens // 100)  # the nearest-rank percentile; kthvalue has no limit on T, quantile has
    p99 = distance_T.kthvalue(rank_of_p99).values
    k3 = (torch.expm1(difference_T) - difference_T).mean()
    mean, percentile, largest, kl = torch.stack([distance_T.mean(), p99, distance_T.max(), k3]).tolist()
    return Agreement(mean, percentile, largest, kl, num_tokens)
