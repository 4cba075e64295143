"""How engines sample tokens: filters, one uniform number per token, inverse of the cumulative distribution.

Legend: B rows, V vocabulary. Random numbers are a pure function of (seed of the request, number of the token), so a
response does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

ELEMENTS_AT_ONCE = 1 << 24
"""Logits that are processed together: bounds the float32 copies to 64 MiB each."""
LARGEST_UNIFORM = 1.0 - 2.0**-52
"""That `uniform` gives."""


@dataclass(frozen=True)
class SamplingColumns:
    """The sampling parameters of rows, each of shape [B]; meanings as in `rollout.base.Sampling`."""

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    min_p: torch.Tensor
    uniform: torch.Tensor
    """float64 in [0, 1): the random number of each row's token."""

    def __getitem__(self, rows: slice) -> SamplingColumns:
        return SamplingColumns(self.temperature[rows], self.top_p[rows], self.top_k[rows], self.min_p[rows], self.uniform[rows])


def choose(logits_BV: torch.Tensor, columns: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, and its log-probability in nats after temperature and before the filters.

    Returns int64 and float32 tensors of shape [B]. Arithmetic is float32 whatever the dtype of the logits.
    """
    rows_at_once = max(1, ELEMENTS_AT_ONCE // logits_BV.shape[1])
    parts = [
        _choose(logits_BV[start : start + rows_at_once], columns[slice(start, start + rows_at_once)])
        for start in range(0, len(logits_BV), rows_at_once)
    ]
    tokens, log_probs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _choose(logits_BV: torch.Tensor, columns: SamplingColumns) -> tuple[torch.Tensor, torch.Tensor]:
    is_greedy_B = columns.temperature == 0
    divisor_B = torch.where(is_greedy_B, 1.0, columns.temperature)
    scaled_BV = logits_BV.float() / divisor_B[:, None]
    log_total_B = scaled_BV.logsumexp(-1)
    tokens_B = scaled_BV.argmax(-1)
    if not bool(is_greedy_B.all()):
        probs_BV = filter_probs((scaled_BV - log_total_B[:, None]).exp_(), columns)
        tokens_B = torch.where(is_greedy_B, tokens_B, sample(probs_BV, columns.uniform))
    return tokens_B, scaled_BV.gather(1, tokens_B[:, None]).squeeze(1) - log_total_B


def sample(probs_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """One token for each row by the inverse of its cumulative distribution, at a number in [0, 1) as `uniform` gives.

    Probabilities need not add up to one. First the block of K tokens is found among N, then the token in it, so that running
    sums in float64 are short. A token of probability zero is never sampled, unless its row is not finite or all zeros. Returns
    int64 of shape [B].

    Example:
        >>> probs_BV = torch.tensor([[0.25, 0.25, 0.5]] * 3)
        >>> sample(probs_BV, torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64))
        tensor([0, 1, 2])
    """
    num_rows, num_tokens = probs_BV.shape
    num_in_block = _num_in_block(num_tokens)
    probs_BNK = probs_BV.view(num_rows, num_tokens // num_in_block, num_in_block)
    sums_BN = probs_BNK.sum(-1, dtype=torch.float64)
    up_to_BN = sums_BN.cumsum(-1)
    target_B1 = uniform_B[:, None] * up_to_BN[:, -1:]
    block_B1 = torch.searchsorted(up_to_BN, target_B1, right=True).clamp_(max=sums_BN.shape[1] - 1)
    sum_B1 = sums_BN.gather(1, block_B1)
    below_B1 = up_to_BN.gather(1, block_B1) - sum_B1
    fraction_B1 = ((target_B1 - below_B1) / sum_B1).clamp_(0.0, LARGEST_UNIFORM)
    in_block_BK = probs_BNK.gather(1, block_B1[..., None].expand(-1, 1, num_in_block)).squeeze(1)
    up_to_BK = in_block_BK.cumsum(-1, dtype=torch.float64)
    place_B1 = torch.searchsorted(up_to_BK, fraction_B1 * up_to_BK[:, -1:], right=True).clamp_(max=num_in_block - 1)
    return (block_B1 * num_in_block + place_B1).squeeze(1)


@cache
def _num_in_block(num_tokens: int) -> int:
    """The divisor nearest to the square root: as many blocks as tokens in each, where there is such a one."""
    divisors = [number for number in range(1, num_tokens + 1) if num_tokens % number == 0]
    return min(divisors, key=lambda number: max(number, num_tokens // number))


def filter_probs(probs_BV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """Probabilities with zeros where min-p, then top-k, then top-p drop a token, in the order of vLLM's filters.

    Each filter works on what the one before it left; the result is not normalised.
    """
    if bool((columns.min_p > 0).any()):
        least_B1 = columns.min_p[:, None] * probs_BV.amax(-1, keepdim=True)
        probs_BV = probs_BV.where(probs_BV >= least_B1, 0.0)
    num_tokens = probs_BV.shape[1]
    has_order_cut_B = ((columns.top_k > 0) & (columns.top_k < num_tokens)) | (columns.top_p < 1)
    if not bool(has_order_cut_B.any()):
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(stable=True, dim=-1, descending=True)
    rank_V = torch.arange(num_tokens, device=probs_BV.device)
    most_B1 = torch.where(columns.top_k > 0, columns.top_k, num_tokens)[:, None]
    sorted_BV = sorted_BV.where(rank_V < most_B1, 0.0)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    is_kept_BV = before_BV < columns.top_p[:, None] * sorted_BV.sum(-1, keepdim=True)
    is_kept_BV |= columns.top_p[:, None] >= 1
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, sorted_BV.where(is_kept_BV, 0.0))
