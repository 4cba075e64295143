"""Losses by their definitions, one token at a time in Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def kl(log_prob: float, reference: float, kind: str) -> float:
    """Schulman's three estimators and the absolute one, from probabilities."""
    ratio = math.exp(reference) / math.exp(log_prob)
    logarithm = math.log(ratio)
    return {"k1": -logarithm, "k2": logarithm**2 / 2, "k3": (ratio - 1) - logarithm, "abs": abs(logarithm)}[kind]


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


def aggregate(losses: Rows, how: str, max_tokens: int) -> float:
    """One number from the losses of the tokens of all rows."""
    every = [loss for row in losses for loss in row]
    if how in ("token_mean", "token_sum"):
        return math.fsum(every) / (len(every) if how == "token_mean" else 1)
    length = {"sequence_mean": len, "sequence_sum": lambda row: max_tokens, "sequence_mean_of_sums": lambda row: 1}[how]
    return math.fsum(math.fsum(row) / length(row) for row in losses) / len(losses)


def distances(trainer: Sequence[float], engine: Sequence[float], statistic: str) -> list[float]:
    """At each token of a row how far the two are apart: of the token, or of the row."""
    level, _, kind = statistic.rpartition("_")
    differences = [q - p for p, q in zip(trainer, engine, strict=True)]
    each = {
        "k1": list(differences),
        "k2": [d * d / 2 for d in differences],
        "k3": [math.exp(-d) - 1 + d for d in differences],
    }[kind]
    match level:
        case "sequence_sum":
            return [math.fsum(each)] * len(each)
        case "sequence_mean":
            return [math.fsum(each) / len(each)] * len(each) if each else []
        case "sequence_max":
            return [max(each)] * len(each) if each else []
    return each
