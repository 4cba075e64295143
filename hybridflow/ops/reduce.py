"""From numbers per token to one number: the only place where a loss is divided by a count, and metrics kept on the device.

B rows, T tokens of all rows end to end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridflow.config.choices import Aggregation as Aggregation
from hybridflow.metrics import Kind, Metric, Metrics

__all__ = ["Aggregation", "Counts", "TokenMetric", "accumulate", "row_means", "row_sums", "to_metrics", "token_weights"]


@dataclass(frozen=True)
class Counts:
    """What one optimizer update is made of, over all its microbatches and ranks."""

    tokens: int
    rows: int


def token_weights(lengths_B: Tensor, *, aggregation: Aggregation, counts: Counts, max_tokens: int | None = None) -> Tensor:
    """Weights [T], float32, such that the sum of `loss_T * weights_T` over all microbatches and ranks is the loss.

    `max_tokens` is the constant length of `sequence_sum` and unused otherwise. Call it where `lengths_B` is on the CPU: on
    a GPU the number of tokens has to be waited for.

    Example:
        >>> token_weights(torch.tensor([2, 1]), aggregation="sequence_mean", counts=Counts(tokens=3, rows=2))
        tensor([0.2500, 0.2500, 0.5000])
        >>> token_weights(torch.tensor([2, 1]), aggregation="token_mean", counts=Counts(tokens=3, rows=2))
        tensor([0.3333, 0.3333, 0.3333])
    """
    match aggregation:
        case "token_mean":
            weights_B = torch.full(lengths_B.shape, 1.0 / max(counts.tokens, 1), dtype=torch.float64)
        case "sequence_mean":
            weights_B = 1.0 / (lengths_B.clamp(min=1).double() * max(counts.rows, 1))
        case "token_sum":
            weights_B = torch.ones(lengths_B.shape, dtype=torch.float64)
        case "sequence_mean_of_sums":
            weights_B = torch.full(lengths_B.shape, 1.0 / max(counts.rows, 1), dtype=torch.float64)
        case "sequence_sum":
            assert max_tokens is not None, "aggregation 'sequence_sum' divides by max_tokens, which the loss does not give"
            weights_B = torch.full(lengths_B.shape, 1.0 / (max(counts.rows, 1) * max_tokens), dtype=torch.float64)
    return torch.repeat_interleave(weights_B.float().to(lengths_B.device), lengths_B)


def row_sums(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """The sum of each row: shape [B]. Neither waits for the device nor depends on an order of atomic additions.

    Example:
        >>> row_sums(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2, 1]))
        tensor([3., 5.])
    """
    return torch.segment_reduce(values_T, "sum", lengths=lengths_B, unsafe=True, initial=0.0)


def row_means(values_T: Tensor, lengths_B: Tensor) -> Tensor:
    """The mean of each row, 0 where a row has no tokens: shape [B].

    Example:
        >>> row_means(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2, 1, 0]))
        tensor([1.5000, 5.0000, 0.0000])
    """
    return row_sums(values_T, lengths_B) / lengths_B.clamp(min=1)


def repeat_rows(row_B: Tensor, lengths_B: Tensor, *, num_tokens: int) -> Tensor:
    """Each row's number at each of its tokens: shape [T]. Knowing `num_tokens` spares waiting for the device.

    Example:
        >>> repeat_rows(torch.tensor([1.0, 5.0]), torch.tensor([2, 1]), num_tokens=3)
        tensor([1., 1., 5.])
    """
    return torch.repeat_interleave(row_B, lengths_B, output_size=num_tokens)


@dataclass
class TokenMetric:
    """A metric that still grows, as scalars on the device: reading it would stop the host until the device is done."""

    total: Tensor
    """float64, shape []; for a mean, the sum over what was counted."""
    count: Tensor
    """float64, shape []: how many were counted. Unused unless a mean."""
    kind: Kind = "mean"

    @staticmethod
    def mean(values_T: Tensor, weights_T: Tensor | None = None) -> TokenMetric:
        """The mean of `values_T`, of booleans their share; with `weights_T` the mean so weighted."""
        values_T = values_T.detach()
        if weights_T is None:
            return TokenMetric(values_T.sum(dtype=torch.float64), _scalar(values_T.numel(), values_T.device))
        return TokenMetric((values_T * weights_T).sum(dtype=torch.float64), weights_T.sum(dtype=torch.float64))

    @staticmethod
    def of(mean: Tensor, *, count: int) -> TokenMetric:
        """A mean that is known, shape [], of `count` numbers."""
        return TokenMetric(mean.detach().double() * count, _scalar(count, mean.device))

    @staticmethod
    def sum(values_T: Tensor) -> TokenMetric:
        """The sum of `values_T`."""
        return TokenMetric(values_T.detach().sum(dtype=torch.float64), _scalar(1, values_T.device), "sum")

    @staticmethod
    def max(values_T: Tensor) -> TokenMetric:
        """The largest of `values_T`; minus infinity of none."""
        extended_T = torch.cat([values_T.detach().double(), _scalar(float("-inf"), values_T.device)[None]])
        return TokenMetric(extended_T.amax(), _scalar(1, values_T.device), "max")

    @staticmethod
    def min(values_T: Tensor) -> TokenMetric:
        """The smallest of `values_T`; infinity of none."""
        largest = TokenMetric.max(-values_T)
        return TokenMetric(-largest.total, largest.count, "min")

    def merge(self, other: TokenMetric) -> TokenMetric:
        """Both together."""
        assert self.kind == other.kind, f"one name stands for a {self.kind} and a {other.kind}"
        match self.kind:
            case "max":
                return TokenMetric(torch.maximum(self.total, other.total), self.count, "max")
            case "min":
                return TokenMetric(torch.minimum(self.total, other.total), self.count, "min")
            case _:
                return TokenMetric(self.total + other.total, self.count + other.count, self.kind)


def accumulate(totals: dict[str, TokenMetric], new: Mapping[str, TokenMetric]) -> dict[str, TokenMetric]:
    """Merge the metrics of one more microbatch into `totals`, which is changed and returned."""
    for name, metric in new.items():
        totals[name] = totals[name].merge(metric) if name in totals else metric
    return totals


def to_metrics(totals: Mapping[str, TokenMetric]) -> Metrics:
    """The metrics as numbers, in one copy from the device: the host waits for it here and nowhere before."""
    if not totals:
        return Metrics()
    scalars = [scalar for metric in totals.values() for scalar in (metric.total, metric.count)]
    numbers: list[float] = torch.stack(scalars).tolist()
    named = zip(totals.items(), numbers[0::2], numbers[1::2], strict=True)
    return Metrics({name: Metric(total, count, metric.kind) for (name, metric), total, count in named})


def _scalar(number: float, device: torch.device) -> Tensor:
    return torch.full((), number, dtype=torch.float64, device=device)
