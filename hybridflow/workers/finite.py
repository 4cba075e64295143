"""Whether a model's weights and gradients are finite numbers, and which of them are not, since when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Literal, NoReturn

import torch
import torch.distributed as dist

from hybridflow.config.schema import ReferenceConfig, TrainingConfig
from hybridflow.errors import DivergenceError, listed
from hybridflow.parallel.finite import Found, NamedTensors, largest, local_shard, norms, not_finite

if TYPE_CHECKING:
    from hybridflow.workers.base import RankContext

LARGE = 1e4
"""Weights of language models are far below; the largest above this is worth a word."""
LARGEST = 1e18
"""Weights beyond are as good as infinite: in float32 the square of ten times that is."""
REWARDS = {"advantage", "advantages", "returns"}  # columns of losses that learn from rewards
Cause = Literal["weights", "too large", "not a number"]
"""Of a gradient that is not finite: weights have diverged; they are in order and it is infinite, or something was no number."""


@dataclass(frozen=True)
class WhySkipped:
    """Of an update: in words what was not finite, and what that says of its cause."""

    words: str = ""
    cause: Cause = "weights"
    learns_from_rewards: bool = False


class WeightCheck:
    """Checks the weights of one model, or other numbers of it, and remembers when they were finite last."""

    def __init__(self, context: RankContext, *, config: TrainingConfig | ReferenceConfig, most: float = LARGEST):
        self.context, self.most = context, most
        self.remedy = remedy(context.role, config)
        self.finite_when = ""
        self.versions: dict[str, tuple[int, ...]] = {}
        """Of the tensors that were found finite last."""

    def forget(self) -> None:
        """Something has written to the weights, in a way that they may not show."""
        self.versions.clear()

    def check(self, tensors: NamedTensors, *, when: str) -> None:
        """Every rank of the group calls this. Tensors that nobody has written to since they were found finite are not read
        again; the others cost one pass over them and one wait for the device.

        Raises:
            DivergenceError: a number of any rank is not finite, or beyond `most`; `when` says at which moment that was found.
        """
        named = [(name, tensor) for name, tensor in tensors if tensor is not None]
        versions = {name: _version_of(tensor) for name, tensor in named}
        changed = [(name, tensor) for name, tensor in named if self.versions.get(name) != versions[name]]
        if self._exceeds_on_any_rank(changed):
            self._raise(named, when)
        self.versions |= versions
        self.finite_when = when

    def _exceeds_on_any_rank(self, tensors: NamedTensors) -> bool:
        found = list(norms(tensors).values())
        if len({norm.dtype for norm in found}) > 1:
            found = [norm.float() for norm in found]
        flag = torch.zeros((), device=self.context.device)
        if found:
            flag += (~(torch.stack(found) <= self.most)).any().to(flag.device)
        if self.context.group is not None:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.context.group)
        return bool(flag.item())

    def _raise(self, tensors: NamedTensors, when: str) -> NoReturn:
        found = largest(tensors)
        bad = not_finite(found)
        what = "that are not finite"
        if not bad and (bad := [name for name, value in found.items() if value > self.most]):
            what = f"as large as {max(found.values()):.3g}"
        where = f"{len(bad)} of {len(found)} tensors hold numbers {what}" if bad else "numbers of another rank are not finite"
        since = f"They were in order {self.finite_when}" if self.finite_when else "No check has found them in order before"
        role = self.context.role
        raise DivergenceError(
            f"{role}: {where} {when}{f': {listed(bad)}' if bad else ''}. {since}. {self.remedy}Where this comes again at the "
            "same place, look at the model's files and at the memory of this machine"
        )


def remedy(role: str, config: TrainingConfig | ReferenceConfig, *, lower: str = "Lower") -> str:
    """What to do about weights that are as good as infinite: lower what can have made them so; nothing for a frozen model.

    Example: `Lower actor.learning_rate=0.01. `
    """
    if not isinstance(config, TrainingConfig):
        return ""
    rate, decay = config.learning_rate, config.weight_decay
    if rate <= 1 < rate * decay:
        taken = f"of every weight {rate * decay:.3g} times itself is taken off at each update"
        return f"{lower} {role}.weight_decay={decay:g}: {taken}. "
    return f"{lower} {role}.learning_rate={rate:g}. "


def _version_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """Changes whenever somebody writes to the tensor, or other memory takes its place."""
    shard = local_shard(tensor)
    return tensor._version, shard._version, shard.data_ptr()


class SkippedUpdates:
    """Counts updates in a row that could not be made, and says why none can."""

    def __init__(self, context: RankContext, *, config: TrainingConfig, most: int | None):
        self.context, self.config, self.most = context, config, most
        self.count = 0
        self.since_step = 0
        self.why = WhySkipped()

    def note(self, *, is_skipped: bool, step: int, why: WhySkipped) -> bool:
        """One update was made or skipped; whether that was the first one skipped."""
        if not is_skipped:
            self.count = 0
            return False
        self.count, self.why = self.count + 1, why
        if self.count == 1:
            self.since_step = step
        return self.count == 1

    def raise_if_too_many(self) -> None:
        """Raises:
        DivergenceError: so many in a row have been skipped that the model no longer learns.
        """
        if self.most is not None and self.count >= self.most:
            raise self._ended(f"{self.count} updates in a row were skipped (run.max_skipped_updates={self.most})")

    def raise_if_most_of_the_run(self, *, num_updates: int) -> None:
        """At the end of a run, of `num_updates`, that is shorter than what `raise_if_too_many` waits for.

        Raises:
            DivergenceError: at least half of the updates, two or more, were skipped, up to the last one.
        """
        if self.most is not None and self.count >= max(2, num_updates / 2):
            raise self._ended(f"the last {self.count} of {num_updates} updates were skipped")

    def _ended(self, what: str) -> DivergenceError:
        role = self.context.role
        advice = remedy(role, self.config).rstrip(". ")
        if self.why.cause == "not a number":
            advice = "Look at what the loss computes, and at the rows that it reads"
        elif self.why.learns_from_rewards and self.why.cause == "too large":
            advice = f"Give rewards of a smaller scale. {remedy(role, self.config, lower='Or lower')}".rstrip(". ")
        elif self.why.learns_from_rewards:
            advice += ". Or give rewards of a smaller scale"
        error = DivergenceError(f"{role} no longer learns: {what}, since step {self.since_step}. {self.why.words} {advice}")
        error.since_step = self.since_step
        return error


def why_skipped(norm: float, gradients: Found, weights: Found, losses: Found, columns: Sequence[str]) -> WhySkipped:
    """Which gradients, metrics of the loss and weights are not finite, and the largest weight. The loss reads `columns`."""
    parts = [f"The norm of the gradient is {norm}."]
    if bad := not_finite(gradients):
        parts.append(f"Not finite are the gradients of {len(bad)} of {len(gradients)} tensors: {listed(bad)}.")
    if bad := not_finite(losses):
        parts.append(f"So are {listed([f'{name}={losses[name]}' for name in bad])} of the loss.")
    learns_from_rewards = not REWARDS.isdisjoint(columns)
    cause: Cause = "weights"
    if bad := not_finite(weights):
        parts.append(f"Weights are not finite: {listed(bad)}.")
    elif weights and (name := max(weights, key=lambda name: weights[name])) and weights[name] > LARGE:
        parts.append(f"The weights have diverged: the largest is {weights[name]:.3g}, in {name}.")
    else:
        cause = "not a number" if any(map(isnan, (norm, *gradients.values(), *losses.values()))) else "too large"
        too_large = ": what they are to learn from is too large" if cause == "too large" and learns_from_rewards else ""
        parts.append(f"The weights are in order{too_large}.")
    return WhySkipped(" ".join(parts), cause, learns_from_rewards)
