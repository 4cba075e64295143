"""What a step's log-probabilities say of entropy and of train-inference mismatch, as metrics. Computed where the tokens are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hybridflow.batch import Batch, Ragged
from hybridflow.metrics import Metric, Metrics

if TYPE_CHECKING:
    import torch

    from hybridflow.ops.reduce import TokenMetric
    from hybridflow.workers.microbatches import Microbatch, Microbatches


def entropy_metrics(batch: Batch, entropy: Ragged) -> Metrics:
    """`actor/entropy`: nats per token that the policy sampled. `entropy` has one number per response token."""
    import torch

    from hybridflow.ops.reduce import row_means

    sampled = sampled_tokens(batch, entropy)
    means_B = row_means(torch.from_numpy(sampled.values), torch.from_numpy(sampled.lengths)).numpy()
    return Metrics({"actor/entropy": Metric(float(means_B @ sampled.lengths), float(sampled.lengths.sum()))})


def mismatch_metrics(batch: Batch, log_probs: Ragged, *, is_stale: bool = False) -> Metrics:
    """`mismatch/...` between the batch's `rollout_log_probs` and the trainer's `log_probs`, exact over ranks but for the 99th
    percentile, which is the mean of the ranks' own; and `importance/...` where older weights may have sampled."""
    import torch

    from hybridflow.ops.reduce import to_metrics

    sides = (sampled_tokens(batch, side).values for side in (batch.tokens("rollout_log_probs"), log_probs))
    rollout_R, log_probs_R = (torch.tensor(side) for side in sides)
    return to_metrics(of_tokens(rollout_R, log_probs_R, is_stale=is_stale))


@dataclass(frozen=True)
class ObserveMismatch:
    """The same for the tokens of an update that knows no other log-probabilities of the trainer, computed on the device."""

    is_stale: bool
    """Whether older weights may have sampled: then `importance/...` too, for the effective sample size."""

    def __call__(
        self, microbatches: Microbatches, given: Sequence[tuple[Microbatch, Mapping[str, torch.Tensor]]]
    ) -> dict[str, TokenMetric]:
        import torch

        rollout_R = torch.cat([microbatches.column("rollout_log_probs", microbatch) for microbatch, _ in given])
        return of_tokens(rollout_R, torch.cat([outputs["log_probs"] for _, outputs in given]), is_stale=self.is_stale)


def of_tokens(rollout_R: torch.Tensor, log_probs_R: torch.Tensor, *, is_stale: bool) -> dict[str, TokenMetric]:
    """`mismatch/...` and, where tokens may be stale, `importance/...`."""
    from hybridflow.ops.mismatch import importance_weights, mismatch

    found = {f"mismatch/{name}": metric for name, metric in mismatch(rollout_R, log_probs_R).items()}
    if is_stale:
        found |= {f"importance/{name}": metric for name, metric in importance_weights(rollout_R, log_probs_R).items()}
    return found


def sampled_tokens(batch: Batch, column: Ragged) -> Ragged:
    """Of a column with one number per response token those at tokens that the policy sampled."""
    return column.where(batch.tokens("loss_mask").values.astype(np.bool_)) if "loss_mask" in batch else column
