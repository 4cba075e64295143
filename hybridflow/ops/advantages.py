"""From rewards to advantages: what was better than expected, per token or per row.

B rows, B1 row boundaries (the first is 0, the last T), T tokens of all rows end to end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridflow.config.choices import Resampling

__all__ = ["best_of_group", "drawn_by_reward", "gae", "group_normalized", "is_varied", "kl_in_reward"]
__all__ += ["leave_one_out", "length_weighted", "overlong_penalty", "rescaled", "token_rewards", "whiten"]

PerRow = Tensor | npt.NDArray[np.generic]

STD_FLOOR = 1e-6
"""Added to a group's standard deviation, so that rounding noise in equal rewards is not blown up to a signal."""


def token_rewards(reward_B: Tensor, offsets_B1: Tensor) -> Tensor:
    """Rewards of tokens, float32, shape [T]: the row's reward at its last token, 0 elsewhere.

    Example:
        >>> token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0, 3, 5]))
        tensor([0., 0., 1., 0., 2.])
    """
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

    Example:
        >>> rewards_T, values_T, offsets_B1 = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([0, 2])
        >>> gae(rewards_T, values_T, offsets_B1, gamma=1.0, lam=0.5)  # deltas 0 and 0.5; 0 + 0.5 x 0.5
        (tensor([0.2500, 0.5000]), tensor([0.7500, 1.0000]))
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


Alone = Literal["reward", "zero"]
"""What a row without others in its group gets: its reward, as without a baseline, or 0, so that it teaches nothing."""


def group_normalized(reward_B: PerRow, group_B: PerRow, *, scale_by_std: bool = True, alone: Alone = "reward") -> Tensor:
    """One advantage per row, float32, shape [B]: the reward less its group's mean, divided by its standard deviation.

    Shao et al. 2024, arXiv:2402.03300, sec. 4.1.2; without `scale_by_std` Liu et al. 2025, arXiv:2503.20783, sec. 3.2. The
    deviation is the sample's (divided by rows less one), as in the published implementations. `group_B` holds any integers.
    A group of equal rewards gives 0.

    Example:
        >>> group_normalized(np.array([1.0, 0.0, 5.0, 3.0]), np.array([0, 0, 1, 1]), scale_by_std=False)
        tensor([ 0.5000, -0.5000,  1.0000, -1.0000])
    """
    groups = _Groups(reward_B, group_B)
    deviation_B = groups.less(groups.mean_B, alone)
    if not scale_by_std:
        return deviation_B.float()
    return (deviation_B / (groups.std + STD_FLOOR)).float()


def leave_one_out(reward_B: PerRow, group_B: PerRow, *, alone: Alone = "reward") -> Tensor:
    """One advantage per row, float32, shape [B]: the reward less the mean of the other rewards of its group.

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740, eq. 7.

    Example:
        >>> leave_one_out(np.array([3.0, 0.0, 0.0]), np.array([0, 0, 0]))
        tensor([ 3.0000, -1.5000, -1.5000])
    """
    groups = _Groups(reward_B, group_B)  # r - (n m - r) / (n - 1) = (r - m) n / (n - 1)
    return (groups.less(groups.mean_B, alone) * groups.size_B / (groups.size_B - 1).clamp(min=1)).float()


def drawn_by_reward(reward_B: PerRow, how: float | Resampling, *, seeds: Sequence[int]) -> npt.NDArray[np.int64]:
    """Numbers of as many rows, drawn with replacement: each as often as this power of its absolute reward says; of the best and
    the worst alone; or the best four times as often as any other.

    PF-PPO, Shen et al. 2024, arXiv:2409.06957.

    Example:
        >>> sorted(set(drawn_by_reward(np.array([0.0, 1.0, 3.0, 2.0]), "best_and_worst", seeds=(0, 1)).tolist()) - {0, 2})
        []
    """
    score_B: npt.NDArray[np.float64] = np.asarray(reward_B, np.float64)
    best_B = score_B == score_B.max()
    if how == "best":
        weight_B = np.where(best_B, 0.4, 0.1)
    elif how == "best_and_worst":
        weight_B = (best_B | (score_B == score_B.min())) + 1e-8
    else:  # |r| ** how + 1e-8, over the largest so that no power overflows
        with np.errstate(divide="ignore"):
            log_weight_B = np.logaddexp(how * np.log(np.abs(score_B)), math.log(1e-8))
        weight_B = np.exp(log_weight_B - log_weight_B.max())
    return np.random.default_rng(seeds).choice(len(score_B), len(score_B), p=weight_B / weight_B.sum())


def length_weighted(reward_B: PerRow, group_B: PerRow, tokens_B: PerRow, *, alone: Alone = "reward") -> Tensor:
    """One advantage per row, float32, shape [B]: the reward less the group's mean weighted by numbers of tokens.

    It is the baseline of least variance where the gradient of every token has the same norm.

    OPO, Hao et al. 2025, arXiv:2505.23585, eq. 9.

    Example:
        >>> length_weighted(np.array([1.0, 0.0]), np.array([0, 0]), np.array([30, 10]))  # the baseline is 30 / 40
        tensor([ 0.2500, -0.7500])
    """
    groups, tokens_B = _Groups(reward_B, group_B), _as_tensor(tokens_B).double()
    baseline_B = groups.sums(groups.reward_B * tokens_B) / groups.sums(tokens_B).clamp(min=1.0)
    return groups.less(baseline_B, alone).float()


def best_of_group(reward_B: PerRow, group_B: PerRow, *, scale_by_std: bool = True) -> Tensor:
    """One advantage per row, float32, shape [B]: of the best row of a group its reward less the second one; 0 for all others.

    The gradient of the best of n rewards: Tang et al. 2025, arXiv:2503.19595, eq. 6; divided by the group's standard deviation
    where `scale_by_std`. Where the best reward is there twice, or a row is alone, all get 0.

    Example:
        >>> best_of_group(np.array([5.0, 3.0, 1.0]), np.array([0, 0, 0]), scale_by_std=False)
        tensor([2., 0., 0.])
    """
    groups = _Groups(reward_B, group_B)
    advantage_B = torch.zeros_like(groups.reward_B)
    for number in range(int(groups.index_B.max()) + 1 if len(groups.index_B) else 0):
        rows = (groups.index_B == number).nonzero()[:, 0]
        if len(rows) > 1:
            best, second = groups.reward_B[rows].topk(2).values
            advantage_B[rows[groups.reward_B[rows].argmax()]] = best - second
    return (advantage_B / (groups.std + STD_FLOOR) if scale_by_std else advantage_B).float()


def is_varied(reward_B: PerRow, group_B: PerRow) -> Tensor:
    """Of each row whether its group has several rewards, bool, shape [B]: only then does a baseline leave anything to learn.

    Example:
        >>> is_varied(np.array([1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 1]))
        tensor([ True,  True, False, False])
    """
    groups = _Groups(reward_B, group_B)
    return groups.sums((groups.reward_B - groups.mean_B).square()) > 0


def rescaled(advantage_B: Tensor, informative_B: PerRow) -> Tensor:
    """Advantages times all rows over the informative ones: rows without gradient do not thin out a step.

    GPG, Chu et al. 2025, arXiv:2504.02546, eq. 7, where rows are informative whose group has several rewards; its authors'
    code, and verl's, count the rows whose reward is not 0.

    Example:
        >>> rescaled(torch.tensor([0.5, -0.5, 0.0, 0.0]), np.array([True, True, False, False]))
        tensor([ 1., -1.,  0.,  0.])
    """
    return advantage_B * (len(advantage_B) / _as_tensor(informative_B).count_nonzero().clamp(min=1))


def overlong_penalty(tokens_B: PerRow, *, max_tokens: int, buffer_tokens: int) -> Tensor:
    """What to add to rewards of long responses, float32, shape [B]: 0 up to `max_tokens - buffer_tokens` tokens, from there
    falling linearly to -1 at `max_tokens`.

    DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13.

    Example:
        >>> overlong_penalty(np.array([70, 90, 120]), max_tokens=100, buffer_tokens=20)
        tensor([-0.0000, -0.5000, -1.0000])
    """
    excess_B = _as_tensor(tokens_B).float() - (max_tokens - buffer_tokens)
    return -(excess_B / buffer_tokens).clamp(0.0, 1.0)


class _Groups:
    """Rewards by group, in float64: sums of float32 numbers are exact at such sizes, so equal rewards deviate by exactly 0."""

    def __init__(self, reward_B: PerRow, group_B: PerRow):
        self.reward_B = _as_tensor(reward_B).float().double()
        _, self.index_B = torch.unique(_as_tensor(group_B), return_inverse=True)
        self.size_B = self.sums(torch.ones_like(self.reward_B))
        self.mean_B = self.sums(self.reward_B) / self.size_B

    def sums(self, values_B: Tensor) -> Tensor:
        """Of each row, the sum over its group."""
        return torch.zeros_like(values_B).index_add_(0, self.index_B, values_B)[self.index_B]

    @property
    def std(self) -> Tensor:
        """Of each row, the sample's standard deviation of its group; 1 for a row alone."""
        variance_B = self.sums((self.reward_B - self.mean_B).square()) / (self.size_B - 1).clamp(min=1)
        return torch.where(self.size_B > 1, variance_B.sqrt(), 1.0)

    def less(self, baseline_B: Tensor, alone: Alone) -> Tensor:
        """Rewards less a baseline; `alone` says what a row without others has."""
        without_B = self.reward_B if alone == "reward" else torch.zeros_like(self.reward_B)
        return torch.where(self.size_B > 1, self.reward_B - baseline_B, without_B)


def _as_tensor(row_B: PerRow) -> Tensor:
    return row_B if isinstance(row_B, Tensor) else torch.tensor(row_B)  # a copy: torch warns of arrays that are read-only
