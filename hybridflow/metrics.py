"""Metrics that add up: each knows how to be merged over microbatches, updates and ranks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["mean", "sum", "max", "min"]


@dataclass(frozen=True)
class Metric:
    """A number that can be merged with others of its name.

    Example:
        >>> Metric(total=6.0, count=3).merge(Metric(total=10.0, count=1)).value  # the mean of four numbers
        4.0
    """

    total: float
    """The value; for a mean, the sum over what was counted."""
    count: float = 1.0
    """For a mean: how many were counted. Unused otherwise."""
    kind: Kind = "mean"

    @property
    def value(self) -> float:
        if self.kind != "mean":
            return self.total
        return self.total / self.count if self.count else float("nan")

    def merge(self, other: Metric) -> Metric:
        assert self.kind == other.kind, f"one name stands for a {self.kind} and a {other.kind}"
        match self.kind:
            case "mean":
                return Metric(self.total + other.total, self.count + other.count)
            case "sum":
                return Metric(self.total + other.total, kind="sum")
            case "max":
                return Metric(max(self.total, other.total), kind="max")
            case "min":
                return Metric(min(self.total, other.total), kind="min")


class Metrics(Mapping[str, float]):
    """Named numbers. Reading gives the value; `+` and `merged` combine two sets by each metric's kind.

    Names are `part/what`, for example `actor/clip_fraction`; docs/metrics.md lists them.
    """

    def __init__(self, metrics: Mapping[str, Metric | float] | None = None):
        self._metrics = {
            name: metric if isinstance(metric, Metric) else Metric(float(metric)) for name, metric in (metrics or {}).items()
        }

    def __getitem__(self, name: str) -> float:
        return self._metrics[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)

    def __add__(self, other: Metrics) -> Metrics:
        return Metrics.merged([self, other])

    def __repr__(self) -> str:
        return f"Metrics({dict(self)!r})"

    @staticmethod
    def merged(parts: Iterable[Metrics]) -> Metrics:
        """One set from many: means weighted by their counts, sums added, maxima and minima taken.

        Example:
            >>> Metrics.merged([Metrics({"loss": 1.0}), Metrics({"loss": Metric(9.0, count=3)})])
            Metrics({'loss': 2.5})
        """
        merged: dict[str, Metric] = {}
        for part in parts:
            for name, metric in part._metrics.items():
                merged[name] = merged[name].merge(metric) if name in merged else metric
        return Metrics(merged)

    def only(self, names: Container[str]) -> Metrics:
        """Those with one of the names."""
        return Metrics({name: metric for name, metric in self._metrics.items() if name in names})

    def without(self, names: Container[str]) -> Metrics:
        """All but those with one of the names."""
        return Metrics({name: metric for name, metric in self._metrics.items() if name not in names})

    def renamed(self, old: str, new: str) -> Metrics:
        """Those whose names begin with `old`, with `new` in its place.

        Example:
            >>> Metrics({"actor/loss": 1.0, "critic/loss": 2.0}).renamed("actor/", "held_out/")
            Metrics({'held_out/loss': 1.0})
        """
        found = {name: metric for name, metric in self._metrics.items() if name.startswith(old)}
        return Metrics({new + name.removeprefix(old): metric for name, metric in found.items()})

    def prefixed(self, prefix: str) -> Metrics:
        """The same metrics with `prefix/` before each name."""
        return Metrics({f"{prefix}/{name}": metric for name, metric in self._metrics.items()})
