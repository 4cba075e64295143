"""Whether a model's weights and gradients are finite numbers, and which of them are not, since when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hybridflow.errors import DivergenceError
from hybridflow.parallel.finite import NamedTensors, largest, listed, not_finite

if TYPE_CHECKING:
    from hybridflow.workers.base import RankContext

LARGE = 1e4
"""Weights of language models are far below; the largest above this is worth a word."""


class WeightCheck:
    """Checks the weights of one model, and remembers when they were finite last."""

    def __init__(self, context: RankContext):
        self.context = context
        self.finite_when = ""

    def check(self, tensors: NamedTensors, *, when: str) -> None:
        """Every rank of the group calls this.

        Raises:
            DivergenceError: a weight of any rank is not finite; `when` says at which moment that was found.
        """
        found = largest(tensors)
        bad = not_finite(found)
        if self._on_any_rank(bool(bad)):
            since = (
                f"They were still finite {self.finite_when}" if self.finite_when else "No check has found them finite before"
            )
            where = f"{len(bad)} of {len(found)} tensors hold weights" if bad else "another rank's shares hold weights"
            names = f": {listed(bad)}" if bad else ""
            raise DivergenceError(
                f"{self.context.role}: {where} that are not finite {when}{names}. {since}. Go on from an earlier "
                "checkpoint with a lower learning rate; where this comes again at the same place, look at the model's files "
                "and at the memory of this machine"
            )
        self.finite_when = when

    def _on_any_rank(self, is_bad: bool) -> bool:
        if self.context.group is None:
            return is_bad
        flag = torch.tensor(float(is_bad), device=self.context.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.context.group)
        return bool(flag.item())


class SkippedUpdates:
    """Counts updates in a row that could not be made, and says why none can."""

    def __init__(self, context: RankContext, *, most: int | None):
        self.context, self.most = context, most
        self.count = 0
        self.since_step = 0

    def note(self, *, is_skipped: bool, step: int) -> bool:
        """One update was made or skipped; whether that was the first one skipped."""
        if not is_skipped:
            self.count = 0
            return False
        self.count += 1
        if self.count == 1:
            self.since_step = step
        return self.count == 1

    def raise_if_too_many(self, why: str) -> None:
        """Raises:
        DivergenceError: so many in a row have been skipped that the model no longer learns.
        """
        if self.most is not None and self.count >= self.most:
            role, step = self.context.role, self.since_step
            go_on = f"Go on from a checkpoint before step {step}" if step > 1 else "Start anew"
            raise DivergenceError(
                f"{role} no longer learns: {self.count} updates in a row were skipped (run.max_skipped_updates={self.most}), "
                f"since step {step}. {why} {go_on} with a lower {role}.learning_rate, or with rewards of a smaller scale"
            )


def why_skipped(norm: float, gradients: dict[str, float], weights: dict[str, float], losses: dict[str, float]) -> str:
    """In words: which gradients, metrics of the loss and weights are not finite, and the largest weight."""
    parts = [f"The norm of the gradient is {norm}."]
    if bad := not_finite(gradients):
        parts.append(f"Not finite are the gradients of {len(bad)} of {len(gradients)} tensors: {listed(bad)}.")
    if bad := not_finite(losses):
        parts.append(f"So are {listed([f'{name}={losses[name]}' for name in bad])} of the loss.")
    if bad := not_finite(weights):
        parts.append(f"Weights are not finite: {listed(bad)}.")
    elif weights and (name := max(weights, key=lambda name: weights[name])) and weights[name] > LARGE:
        parts.append(f"The weights have diverged: the largest is {weights[name]:.3g}, in {name}.")
    return " ".join(parts)
