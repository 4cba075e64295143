"""Advantages by their definitions, with Python loops over floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def gae(rewards: Rows, values: Rows, gamma: float, lam: float) -> list[list[float]]:
    """A_t = sum over l of (gamma lam)^l delta_(t+l): the infinite sum of arXiv:1506.02438, eq. 16, not the recursion."""
    return [_gae_of_row(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)]


def _gae_of_row(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    after = [*values, 0.0][1:]
    deltas = [r + gamma * next_value - v for r, v, next_value in zip(rewards, values, after, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas))) for t in range(len(deltas))]


def discounted_returns(rewards: Sequence[float], gamma: float) -> list[float]:
    """Sum of the rewards from each token on, discounted."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def whiten(values: Sequence[float]) -> list[float]:
    """Mean 0, variance 1."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return [(value - mean) / math.sqrt(variance) for value in values]


def group_normalized(rewards: Sequence[float], groups: Sequence[int], scale_by_std: bool) -> list[float]:
    """(r - mean) / sample standard deviation, group by group; a row alone has no baseline."""
    result = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        if len(members) == 1:
            result.append(reward)
            continue
        mean = math.fsum(members) / len(members)
        squares = math.fsum((r - mean) ** 2 for r in members)
        deviation = reward - mean
        if scale_by_std:
            deviation = deviation / math.sqrt(squares / (len(members) - 1)) if len(set(members)) > 1 else 0.0
        result.append(deviation)
    return result


def leave_one_out(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """The reward less the mean of the others in its group."""
    result = []
    for i, group in enumerate(groups):
        others = [rewards[j] for j in range(len(rewards)) if groups[j] == group and j != i]
        result.append(rewards[i] - (math.fsum(others) / len(others) if others else 0.0))
    return result
