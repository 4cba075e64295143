"""Train-inference mismatch: how far the engine's log-probabilities are from the trainer's, for the same tokens.

T response tokens that the policy sampled. Everything in float32 and in nats. Under equal weights it shows kernels and
precision that differ; of tokens that older weights sampled, also how far the policy has moved since.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybridflow.ops.kl import MAX_LOG_RATIO
from hybridflow.ops.reduce import TokenMetric


@torch.no_grad()
def mismatch(rollout_log_probs_T: Tensor, log_probs_T: Tensor) -> dict[str, TokenMetric]:
    """The engine's against the trainer's log-probabilities, any float dtype, shape [T], without waiting for the device.

    `mean`, `p99` (at least 99 % of these tokens differ by this or less) and `max` of |difference|, and `k3`, the estimate of
    KL(engine || trainer) of Schulman 2020: exp(d) - 1 - d with d = trainer - engine. Nothing where there are no tokens.

    Example:
        >>> found = mismatch(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
        >>> float(found["mean"].total / found["mean"].count), float(found["max"].total)
        (0.25, 0.5)
    """
    num_tokens = rollout_log_probs_T.numel()
    assert log_probs_T.shape == rollout_log_probs_T.shape, "both are about the same tokens"
    if num_tokens == 0:
        return {}
    difference_T = log_probs_T.float() - rollout_log_probs_T.float()
    distance_T = difference_T.abs()
    rank_of_p99 = -(-99 * num_tokens // 100)  # the nearest-rank percentile; kthvalue has no limit on T, quantile has
    k3_T = torch.expm1(difference_T) - difference_T
    means = {"mean": distance_T.mean(), "p99": distance_T.kthvalue(rank_of_p99).values, "k3": k3_T.mean()}
    counted = {name: TokenMetric.of(value, count=num_tokens) for name, value in means.items()}
    return counted | {"max": TokenMetric.max(distance_T)}


@torch.no_grad()
def importance_weights(rollout_log_probs_T: Tensor, log_probs_T: Tensor) -> dict[str, TokenMetric]:
    """Mean of the weights trainer / engine and of their squares: what the effective sample size is computed from."""
    ratio_T = (log_probs_T.float() - rollout_log_probs_T.float()).clamp(max=MAX_LOG_RATIO).exp()
    return {"weight": TokenMetric.mean(ratio_T), "weight_sq": TokenMetric.mean(ratio_T.double().square())}
