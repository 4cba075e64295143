"""Surrogates: the loss of each token as a function of probability ratio and advantage, to be put into a `PolicyLoss`.

Each is a function of a microbatch's tokens that knows where rows end; options are bound by `functools.partial`.
B rows, T response tokens of all rows of the microbatch end to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hybridflow.ops.kl import MAX_LOG_RATIO, kl_estimate
from hybridflow.ops.reduce import TokenMetric, repeat_rows, row_means

__all__ = ["PolicyTokens", "Surrogate", "clip_covariance", "clipped", "clipped_weight", "geometric_mean"]
__all__ += ["kl_covariance", "policy_gradient", "quadratic", "sequence_ratio", "soft_gate", "token_ratio", "within_divergence"]

MAX_LOG_SEQUENCE_RATIO = 10.0
"""Of a row's mean; beyond it the exponential says no more than `far off`."""


@dataclass(frozen=True, kw_only=True)
class PolicyTokens:
    """What a surrogate is computed from."""

    log_probs_T: Tensor
    """In nats, with gradient."""
    old_T: Tensor
    """The denominator of the ratio, without gradient."""
    advantage_T: Tensor
    lengths_B: Tensor
    """Tokens of each row."""

    @property
    def log_ratio(self) -> Tensor:
        """Log of policy / old, bounded so that its exponential is finite: an infinite ratio that a minimum leaves out would
        still give gradient 0 * inf."""
        return (self.log_probs_T - self.old_T).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def spread(self, row_B: Tensor) -> Tensor:
        """Each row's number at each of its tokens, shape [T]."""
        return repeat_rows(row_B, self.lengths_B, num_tokens=len(self.log_probs_T))

    def metrics(self, ratio_T: Tensor) -> dict[str, TokenMetric]:
        """What every surrogate with a ratio tells."""
        approx_kl_T = kl_estimate(self.old_T, self.log_probs_T.detach(), "k3")
        return {"approx_kl": TokenMetric.mean(approx_kl_T), "ratio_max": TokenMetric.max(ratio_T)}


Computed = tuple[Tensor, dict[str, TokenMetric]]
"""The loss of each token, shape [T], and metrics."""
Surrogate = Callable[[PolicyTokens], Computed]
Divergence = Literal["tv", "kl"]
"""Total variation, or Kullback-Leibler."""


def token_ratio(tokens: PolicyTokens) -> Tensor:
    """policy / old of each token, shape [T]."""
    return tokens.log_ratio.exp()


def sequence_ratio(tokens: PolicyTokens) -> Tensor:
    """The geometric mean of a row's ratios at each of its tokens, shape [T], with the gradient of the token alone.

    GSPO-token, Zheng et al. 2025, arXiv:2507.18071, eq. 14; with one advantage per row its gradient is that of eq. 5.
    """
    log_probs_T = tokens.log_probs_T
    mean_B = row_means((log_probs_T - tokens.old_T).detach(), tokens.lengths_B)
    return (log_probs_T - log_probs_T.detach() + tokens.spread(mean_B)).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()


def clipped(
    tokens: PolicyTokens,
    *,
    clip: tuple[float, float],
    dual_clip: float | None = None,
    ratio: Callable[[PolicyTokens], Tensor] = token_ratio,
) -> Computed:
    """-min(r A, clip(r) A); where A < 0 at most -dual_clip A.

    PPO, Schulman et al. 2017, arXiv:1707.06347, eq. 7; bounds apart, DAPO, arXiv:2503.14476, eq. 10; dual clip,
    arXiv:1912.09729, eq. 5. With `ratio=sequence_ratio` GSPO.

    Example:
        >>> log_probs_T, old_T = torch.tensor([1.5, 1.1]).log(), torch.zeros(2)
        >>> tokens = PolicyTokens(
        ...     log_probs_T=log_probs_T, old_T=old_T, advantage_T=torch.ones(2), lengths_B=torch.tensor([2])
        ... )
        >>> clipped(tokens, clip=(0.2, 0.2))[0]  # ratios 1.5 and 1.1
        tensor([-1.2000, -1.1000])
    """
    low, high = clip
    advantage_T, ratio_T = tokens.advantage_T, ratio(tokens)
    clipped_T = ratio_T.clamp(1.0 - low, 1.0 + high)
    loss_T = -torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    with torch.no_grad():
        is_upper_T = (advantage_T > 0) & (ratio_T > 1.0 + high)
        is_lower_T = (advantage_T < 0) & (ratio_T < 1.0 - low)
        metrics = {
            "clip_fraction": TokenMetric.mean(is_upper_T | is_lower_T),
            "clip_fraction_upper": TokenMetric.mean(is_upper_T),
            "clip_fraction_lower": TokenMetric.mean(is_lower_T),
            **tokens.metrics(ratio_T),
        }
    if dual_clip is not None:
        bound_T = -dual_clip * advantage_T
        metrics["dual_clip_fraction"] = TokenMetric.mean((advantage_T < 0) & (loss_T > bound_T))
        loss_T = torch.where(advantage_T < 0, torch.minimum(loss_T, bound_T), loss_T)
    return loss_T, metrics


def clipped_weight(tokens: PolicyTokens, *, clip: tuple[float, float]) -> Computed:
    """-sg(clip(r)) A log p: every token keeps its gradient, its weight is bounded.

    CISPO, MiniMax-M1 2025, arXiv:2506.13585, eq. 4 and 5.
    """
    ratio_T = token_ratio(tokens).detach()
    weight_T = ratio_T.clamp(1.0 - clip[0], 1.0 + clip[1])
    metrics = {"clip_fraction": TokenMetric.mean(weight_T != ratio_T), **tokens.metrics(ratio_T)}
    return -weight_T * tokens.advantage_T * tokens.log_probs_T, metrics


def within_divergence(tokens: PolicyTokens, *, divergence: Divergence, bounds: tuple[float, float], cap: float) -> Computed:
    """-sg(min(r, cap)) A log p at tokens whose probability has not left a region around the old one; others count nothing.

    A token has left it where its probability has moved in the direction of its advantage, and the distance between policy and
    old policy, each seen as this token or any other, is more than the upper bound (advantage above 0) or the lower one.

    DPPO, Qi et al. 2026, arXiv:2602.04879: `tv` |p - q| and `kl` KL(old || policy) of the two outcomes; the cap, sec. 5.4.
    """
    ratio_T, advantage_T = token_ratio(tokens).detach(), tokens.advantage_T
    new_T, old_T = tokens.log_probs_T.detach().exp(), tokens.old_T.exp()
    match divergence:
        case "tv":
            distance_T = (new_T - old_T).abs()
        case "kl":
            others_T = ((1.0 - old_T + 1e-8) / (1.0 - new_T + 1e-8)).log()
            distance_T = old_T * (tokens.old_T - tokens.log_probs_T.detach()) + (1.0 - old_T) * others_T
    is_up_T = advantage_T > 0
    is_outward_T = torch.where(is_up_T, new_T > old_T, new_T < old_T)
    is_left_T = is_outward_T & (distance_T > torch.where(is_up_T, bounds[1], bounds[0]))
    metrics = {"clip_fraction": TokenMetric.mean(is_left_T), **tokens.metrics(ratio_T)}
    return -ratio_T.clamp(max=cap) * advantage_T * tokens.log_probs_T * ~is_left_T, metrics


def geometric_mean(tokens: PolicyTokens, *, clip: tuple[float, float]) -> Computed:
    """-A exp(mean of a row's log ratios), each kept within [-low, high] where that makes the objective smaller.

    One loss per row, at each of its tokens. GMPO, Zhao et al. 2025, arXiv:2507.20673, eq. 4. A row's advantage is
    the mean of its tokens'.
    """
    low, high = clip
    # Not bounded below: of a mean of logarithms a small one stays finite.
    log_ratio_T = (tokens.log_probs_T - tokens.old_T).clamp(max=MAX_LOG_RATIO)
    sign_T = tokens.advantage_T.sign()
    bounded_T = log_ratio_T.clamp(-low, high)
    kept_T = sign_T * torch.minimum(sign_T * log_ratio_T, sign_T * bounded_T)
    ratio_B = row_means(kept_T, tokens.lengths_B).exp()
    loss_B = -row_means(tokens.advantage_T, tokens.lengths_B) * ratio_B
    with torch.no_grad():
        is_clipped_T = kept_T != sign_T.abs() * log_ratio_T
        metrics = {"clip_fraction": TokenMetric.mean(is_clipped_T), **tokens.metrics(log_ratio_T.exp())}
    return tokens.spread(loss_B), metrics


def soft_gate(tokens: PolicyTokens, *, positive: float, negative: float) -> Computed:
    """-A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of the advantage: a smooth gate in place of a clip.

    SAPO, Gao et al. 2025, arXiv:2511.20347, eq. 5 and 6.
    """
    ratio_T = token_ratio(tokens)
    tau_T = torch.where(tokens.advantage_T > 0, positive, negative).to(ratio_T)
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1.0)) * (4.0 / tau_T)
    return -gate_T * tokens.advantage_T, tokens.metrics(ratio_T.detach())


def policy_gradient(tokens: PolicyTokens) -> Computed:
    """-A log p, without a ratio: REINFORCE, Williams 1992; GPG, Chu et al. 2025, arXiv:2504.02546, eq. 5."""
    return -tokens.advantage_T * tokens.log_probs_T, {}


def quadratic(tokens: PolicyTokens, *, beta: float) -> Computed:
    """-A log p + (beta / 2) (log r)^2: the policy gradient, and a quadratic pull to the old policy in place of a clip.

    DRO, Richemond et al. 2024, arXiv:2405.19107, eq. 5, of which this is what depends on the policy, with an advantage for the
    reward less the value, and per token.
    """
    log_ratio_T = tokens.log_probs_T - tokens.old_T
    loss_T = 0.5 * beta * log_ratio_T.square() - tokens.advantage_T * tokens.log_probs_T
    return loss_T, tokens.metrics(token_ratio(tokens).detach())


def covariance(tokens: PolicyTokens) -> Tensor:
    """(log p - mean) (A - mean) of each token, shape [T], without gradient; means over the tokens of the microbatch.

    Cui et al. 2025, arXiv:2505.22617, eq. 10.
    """
    log_probs_T = tokens.log_probs_T.detach()
    return (log_probs_T - log_probs_T.mean()) * (tokens.advantage_T - tokens.advantage_T.mean())


def kl_covariance(tokens: PolicyTokens, *, share: float, coefficient: float) -> Computed:
    """-r A, plus a KL to the old policy at the `share` of tokens (at least one) whose covariance is largest.

    KL-Cov, Cui et al. 2025, arXiv:2505.22617, eq. 13 and 14; the KL is |log r|, as in the authors' code.
    """
    log_ratio_T = tokens.log_ratio
    ratio_T = log_ratio_T.exp()
    num_chosen = max(1, int(len(ratio_T) * share))
    is_chosen_T = torch.zeros_like(ratio_T).index_fill(0, covariance(tokens).topk(num_chosen).indices, 1.0)
    loss_T = -ratio_T * tokens.advantage_T + coefficient * is_chosen_T * (tokens.log_probs_T - tokens.old_T).abs()
    return loss_T, {"covariance_chosen": TokenMetric.mean(is_chosen_T), **tokens.metrics(ratio_T.detach())}


def clip_covariance(
    tokens: PolicyTokens, *, clip: tuple[float, float], share: float, bounds: tuple[float, float], seed: int
) -> Computed:
    """The clipped surrogate without a `share` of the tokens (at least one): drawn from those that the clip leaves and whose
    covariance is within `bounds`, the ends not counted.

    Clip-Cov, Cui et al. 2025, arXiv:2505.22617, eq. 11 and 12. The draw is a function of `seed` and of how many there are.
    """
    loss_T, metrics = clipped(tokens, clip=clip)
    with torch.no_grad():
        covariance_T, free_T = covariance(tokens), -token_ratio(tokens) * tokens.advantage_T
        is_open_T = (covariance_T > bounds[0]) & (covariance_T < bounds[1]) & (loss_T <= free_T)
        open_N = is_open_T.nonzero()[:, 0]
        order_N = torch.randperm(len(open_N), generator=torch.Generator().manual_seed(seed))
        chosen_N = open_N[order_N[: max(1, int(share * len(loss_T)))].to(open_N.device)]
        keep_T = torch.ones_like(loss_T).index_fill(0, chosen_N, 0.0)
    return loss_T * keep_T, metrics | {"covariance_chosen": TokenMetric.mean(1.0 - keep_T)}
