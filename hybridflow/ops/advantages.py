"""From rewards to advantages: what was better than expected, per token or per row.

B rows, B1 row boundaries (the first is 0, the last T), T tokens of all rows end to end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PerRow = Tensor | npt.NDArray[np.generic]

STD_FLOOR = 1e-6
"""Added to a group's standard deviation, so that rounding noise in equal rewards is not blown up to a signal."""


def token_rewards(reward_B: Tensor, offsets_B1: Tensor) -> Tensor:
    """Rewards of tokens, float32, shape [T]: the row's reward at its last token, 0 elsewhere."""
    rewards_T = torch.zeros(int(offsets_B1[-1]), device=reward_B.device)
    filled_B = offsets_B1.diff() > 0  # the last token of an empty row would be that of the row before
    rewards_T[offsets_B1[1:][filled_B] - 1] = reward_B[filled_B].float()
    return rewards_T


def kl_in_reward(token_rewards_T: Tensor, kl_T: Tensor, coefficient: float) -> Tensor:
    """Rewards of tokens less the weighted KL to the reference: Ouyang et al. 2022, arXiv:2203.02155, eq. 2, per token."""
    return token_rewards_T - coefficient * kl_T


def gae(rewards_T: Tensor, values_T: Tensor, offsets_B1: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of tokens, both float32, shape [T], by generalised advantage estimation.

    Schulman et al. 2016, arXiv:1506.02438, eq. 16, as A_t = delta_t + gamma lam A_(t+1) with delta_t = r_t + gamma V_(t+1)
    - V_t and V = 0 after the row's end. Returns are advantages plus values. Meant for tensors on the CPU: it steps through
    the positions of the longest row, all rows at once.
    """
    rewards_T, values_T = rewards_T.float(), values_T.float()
    advantages_T = _deltas(rewards_T, values_T, offsets_B1, gamma)
    lengths_B, order_B = offsets_B1.diff().sort(descending=True, stable=True)
    num_reaching = _rows_reaching_each_position(lengths_B)
    token_B = offsets_B1[1:][order_B] - 1  # the current token of each row, walking from its end to its start
    carried_B = torch.zeros(len(order_B), device=rewards_T.device)
    for num_rows in num_reaching:
        token_b, carried_b = token_B[:num_rows], carried_B[:num_rows]
        carried_b.mul_(gamma * lam).add_(advantages_T.index_select(0, token_b))
        advantages_T.index_copy_(0, token_b, carried_b)
        token_b.sub_(1)
    return advantages_T, advantages_T + values_T


def _deltas(rewards_T: Tensor, values_T: Tensor, offsets_B1: Tensor, gamma: float) -> Tensor:
    """Temporal differences r_t + gamma V_(t+1) - V_t."""
    next_values_T = torch.zeros_like(values_T)
    next_values_T[:-1] = values_T[1:]
    ends_B = offsets_B1[1:]
    next_values_T[ends_B[ends_B > 0] - 1] = 0.0  # rows end here; an empty row repeats the end of the row before
    return next_values_T.mul_(gamma).add_(rewards_T).sub_(values_T)


def _rows_reaching_each_position(descending_lengths_B: Tensor) -> list[int]:
    """For positions 0, 1, ... below the greatest length: how many rows are longer than that."""
    if not len(descending_lengths_B):
        return []
    positions = torch.arange(int(descending_lengths_B[0]), device=descending_lengths_B.device)
    ascending_B = descending_lengths_B.flip(0)
    reaching: list[int] = (len(ascending_B) - torch.searchsorted(ascending_B, positions, right=True)).tolist()
    return reaching


def whiten(values_T: Tensor, sums: Callable[[Tensor], Tensor]) -> Tensor:
    """`values_T` shifted and scaled to mean 0 and variance 1 over the tokens of all ranks: float32, shape [T].

    `sums` adds a small float64 tensor over the ranks (the identity on one rank); it is called twice on each, so every rank
    must call `whiten`, also one without tokens. Equal values become 0.
    """
    values = values_T.double()
    total, count = sums(torch.stack([values.sum(), values.new_tensor(values.numel())]))
    centred = values - total / count.clamp(min=1)
    variance = sums(centred.square().sum()[None])[0] / count.clamp(min=1)
    whitened_T: Tensor = centred * torch.rsqrt(variance + 1e-8)
    return whitened_T.float()


def group_normalized(reward_B: PerRow, group_B: PerRow, *, scale_by_std: bool = True) -> Tensor:
    """One advantage per row, float32, shape [B]: the reward less its group's mean, divided by its standard deviation.

    Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2; without `scale_by_std` Liu et al. 2025, arXiv:2503.20783, sec. 3.2. The
    deviation is the sample's (divided by rows less one), as in the published implementations. `group_B` holds any integers.
    A group of equal rewards, or of one row, gives 0.
    """
    deviation_B, size_B, index_B = _group_deviations(reward_B, group_B)
    if not scale_by_std:
        return deviation_B.float()
    squares_G = torch.zeros_like(deviation_B).index_add_(0, index_B, deviation_B.square())
    std_B = (squares_G[index_B] / (size_B - 1).clamp(min=1)).sqrt()
    return (deviation_B / (std_B + STD_FLOOR)).float()


def leave_one_out(reward_B: PerRow, group_B: PerRow) -> Tensor:
    """One advantage per row, float32, shape [B]: the reward less the mean of the other rewards of its group.

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740. A row alone in its group has no baseline and gets 0.
    """
    deviation_B, size_B, _ = _group_deviations(reward_B, group_B)
    return (deviation_B * size_B / (size_B - 1).clamp(min=1)).float()  # r - (n m - r) / (n - 1) = (r - m) n / (n - 1)


def _group_deviations(reward_B: PerRow, group_B: PerRow) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: reward less the group's mean (float64), size of the group (float64), number of the group from 0.

    Sums of float32 numbers are exact in float64 at such sizes, so equal rewards deviate by exactly 0.
    """
    rewards_B = _as_tensor(reward_B).float().double()
    _, index_B = torch.unique(_as_tensor(group_B), return_inverse=True)
    size_B = torch.zeros_like(rewards_B).index_add_(0, index_B, torch.ones_like(rewards_B))[index_B]
    total_B = torch.zeros_like(rewards_B).index_add_(0, index_B, rewards_B)[index_B]
    return rewards_B - total_B / size_B, size_B, index_B


def _as_tensor(row_B: PerRow) -> Tensor:
    return row_B if isinstance(row_B, Tensor) else torch.tensor(row_B)  # a copy: torch warns of arrays that are read-only
