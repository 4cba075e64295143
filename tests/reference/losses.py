"""Losses by their definitions, one token at a time in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Rows = Sequence[Sequence[float]]


def kl(log_prob: float, reference: float, kind: Literal["k1", "k2", "k3"]) -> float:
    """Schulman's three estimators, from probabilities."""
    ratio = math.exp(reference) / math.exp(log_prob)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": (ratio - 1) - math.log(ratio)}[kind]


def policy_token(ratio: float, advantage: float, clip: tuple[float, float], dual_clip: float | None = None) -> float:
    """The loss of one token, case by case instead of with minima and maxima."""
    low, high = clip
    if advantage >= 0:
        return -advantage * (1 + high if ratio > 1 + high else ratio)
    if dual_clip is not None and ratio > dual_clip:
        return -advantage * dual_clip
    return -advantage * (1 - low if ratio < 1 - low else ratio)


def value_token(value: float, old: float, target: float, clip: float | None) -> float:
    """Half the squared error, the worse of the free and the clipped one."""
    free = 0.5 * (value - target) ** 2
    if clip is None or abs(value - old) <= clip:
        return free
    moved = old + math.copysign(clip, value - old)
    return max(free, 0.5 * (moved - target) ** 2)


def aggregate(losses: Rows, how: Literal["token_mean", "sequence_mean", "sequence_sum"], max_tokens: int) -> float:
    """One number from the losses of the tokens of all rows."""
    if how == "token_mean":
        every = [loss for row in losses for loss in row]
        return math.fsum(every) / len(every)
    length = {"sequence_mean": len, "sequence_sum": lambda row: max_tokens}[how]
    return math.fsum(math.fsum(row) / length(row) for row in losses) / len(losses)
