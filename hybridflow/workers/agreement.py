"""The step's difference between the engine's and the trainer's log-probabilities, computed where they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hybridflow.batch import Batch
from hybridflow.metrics import Metric, Metrics

if TYPE_CHECKING:
    from hybridflow.workers.base import RankContext

COLUMNS = ("agreement_mean", "agreement_p99", "agreement_max", "agreement_k3")


@dataclass(frozen=True, kw_only=True)
class LogProbAgreement:
    """For `group.compute(batch, LogProbAgreement())` on a batch with `rollout_log_probs` and the trainer's log-probabilities.

    Writes the light columns `agreement_...`: the same numbers in every row of a rank, over all tokens of its rows.
    """

    log_probs: str = "log_probs"
    """Column with the trainer's log-probabilities, under the weights that the engine generated with."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        import torch

        from hybridflow.ops.agreement import log_prob_agreement

        sides = (torch.tensor(batch.tokens(name).values) for name in ("rollout_log_probs", self.log_probs))
        found = log_prob_agreement(*sides)
        values = (found.mean, found.p99, found.max, found.k3)
        return Batch.from_columns(
            {name: np.full(len(batch), value, np.float32) for name, value in zip(COLUMNS, values, strict=True)}
        )


def agreement_metrics(batch: Batch) -> Metrics:
    """`agreement/...` of a batch with the columns of `LogProbAgreement`. Mean, maximum and k3 are exact over ranks; the 99th
    percentile is the mean of the ranks' own, weighted by their tokens."""
    tokens = batch["response_tokens"].astype(np.float64)
    metrics = {
        f"agreement/{name.removeprefix('agreement_')}": Metric(float(batch[name] @ tokens), float(tokens.sum()))
        for name in COLUMNS
    }
    metrics["agreement/max"] = Metric(float(batch["agreement_max"].max(initial=0.0)), kind="max")
    return Metrics(metrics)
