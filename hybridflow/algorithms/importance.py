"""Options about tokens that the engine has sampled: their weights, and which of them a step does without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hybridflow import ops
from hybridflow.config.choices import Rejection
from hybridflow.config.ranges import POSITIVE
from hybridflow.errors import FieldError

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.ops.correction import ImportanceCorrection

DEFAULT_CAP = 2.0
"""Of importance weights, where older weights sample."""


@dataclass(frozen=True, kw_only=True)
class ImportanceOptions:
    """To inherit from: weights between the engine's probabilities, which tokens were drawn with, and the trainer's."""

    importance_cap: Annotated[float, POSITIVE] | Literal["auto"] | None = "auto"
    """Weigh tokens by trainer's over engine's probability, at most this (truncated importance sampling, TIS); null for no
    weights, or with a mask for no bound. auto is 2 where loop.max_staleness lets older weights sample, else null."""
    importance_level: Literal["token", "sequence"] = "token"
    """Whether each token has its own weight or a response has one."""
    importance_mask: tuple[float, float] | None = None
    """Tokens (or responses) whose weight is outside count nothing (masked importance sampling); null for none."""
    importance_normalized: bool = False
    """Divide weights by their mean over the step; with `importance_cap` or `importance_mask`, and `old_log_probs: actor`."""
    rejections: tuple[Rejection, ...] = ()
    """Tokens or responses that a step does without, as if they had not been sampled: each names a `statistic` of the distance
    between engine and trainer, and `most` and `least` of it. With `old_log_probs: rollout` the distance is to the policy in
    training, and they have weight 0 while counts stay, but that of a response's own mean."""

    def __post_init__(self) -> None:
        if self.importance_mask is not None and self.importance_mask[0] >= self.importance_mask[1]:
            low, high = self.importance_mask
            raise ValueError(
                f"importance_mask: found [{low:g}, {high:g}], outside of which is everything; the smaller one comes first"
            )

    def cap(self, run: RunConfig) -> float | None:
        """`importance_cap` with auto resolved."""
        resolved = DEFAULT_CAP if run.loop.max_staleness else None
        return resolved if self.importance_cap == "auto" else self.importance_cap

    def errors_of_mean(self, run: RunConfig, *, is_of_engine: bool) -> list[FieldError]:
        """That `importance_normalized` has no weights to divide; `is_of_engine` says that old log-probabilities are."""
        is_weighing = self.cap(run) is not None or self.importance_mask is not None
        if not self.importance_normalized or (is_weighing and not is_of_engine):
            return []
        do = "algorithm.old_log_probs=actor" if is_of_engine else "algorithm.importance_cap=2, or importance_mask"
        problem = f"divides weights of the step as a whole, and there are none. Set {do}"
        return [FieldError("algorithm.importance_normalized", problem, related=("algorithm.importance_cap",))]

    def importance_correction(self, run: RunConfig) -> ImportanceCorrection | None:
        """What bounds, mask and rejections ask for; None where none is set."""
        return ops.importance_correction(self.cap(run), self.importance_level, self.importance_mask, self.rejections)
