"""Protocols: how a call's arguments reach the ranks of a group, and how their results become one. HybridFlow, table 3.

A protocol is a pair of methods in a class; the table is `registry.PROTOCOLS`, and `@remote("my_package.module:Class")`
names one of your own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from hybridflow.batch import Batch
from hybridflow.data.balance import balanced_parts, divided
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout


@dataclass(frozen=True)
class Arguments:
    """What one rank is called with."""

    args: tuple[object, ...]
    kwargs: dict[str, object]


class Protocol(ABC):
    """Built anew for each call, so that `collect` may use what `distribute` found out."""

    def __init__(self, layout: Layout):
        self.layout = layout

    @abstractmethod
    def distribute(self, arguments: Arguments) -> Sequence[Arguments | None]:
        """The arguments of every rank; None for one that is not called."""

    @abstractmethod
    def collect(self, results: Sequence[object]) -> object:
        """One result from those of every rank, None standing for one that was not called."""

    @property
    def answering(self) -> tuple[int, ...]:
        """Ranks whose results `collect` reads; token data of the others is not kept."""
        return tuple(range(self.layout.num_ranks))


class OneToAll(Protocol):
    """The same arguments to every rank. Metrics are merged, other results come from rank 0."""

    def distribute(self, arguments: Arguments) -> Sequence[Arguments | None]:
        return [arguments] * self.layout.num_ranks

    def collect(self, results: Sequence[object]) -> object:
        metrics = [result for result in results if isinstance(result, Metrics)]
        return Metrics.merged(metrics) if metrics else results[0]


class RankZero(Protocol):
    """Rank 0 alone is called."""

    def distribute(self, arguments: Arguments) -> Sequence[Arguments | None]:
        return [arguments, *[None] * (self.layout.num_ranks - 1)]

    def collect(self, results: Sequence[object]) -> object:
        return results[0]

    @property
    def answering(self) -> tuple[int, ...]:
        return (0,)


class SplitByDataRank(Protocol):
    """Rows of the first batch argument go to data ranks, balanced by tokens; further batches are split alike. Rows with the
    same number in a column `pair` go to the same one.

    Ranks of one data rank (its tensor and sequence ranks) get the same rows. A rank may get none. Batches come back in
    the order of the rows that went out, whatever rank computed them; metrics are merged.
    """

    def __init__(self, layout: Layout):
        super().__init__(layout)
        self.parts: list[npt.NDArray[np.int32]] = []

    def distribute(self, arguments: Arguments) -> Sequence[Arguments | None]:
        batches = [value for value in (*arguments.args, *arguments.kwargs.values()) if isinstance(value, Batch)]
        assert batches, "split_by_data_rank needs a batch among the arguments"
        halves = partial(balanced_parts, num_parts=self.layout.data)
        self.parts = divided(_row_tokens(batches[0]), halves, groups=batches[0].per_row.get("pair"))
        per_data_rank = [self._select(arguments, part) for part in self.parts]
        return [per_data_rank[self.layout.data_rank(rank)] for rank in range(self.layout.num_ranks)]

    @staticmethod
    def _select(arguments: Arguments, part: npt.NDArray[np.int32]) -> Arguments:
        def split(value: object) -> object:
            return value.select(part) if isinstance(value, Batch) else value

        return Arguments(tuple(map(split, arguments.args)), {name: split(value) for name, value in arguments.kwargs.items()})

    def collect(self, results: Sequence[object]) -> object:
        leading = [results[rank] for rank in self.answering]
        if batches := [result for result in leading if isinstance(result, Batch)]:
            assert len(batches) == len(leading), "some ranks returned a batch and some did not"
            order = np.argsort(np.concatenate(self.parts), kind="stable")
            return Batch.concatenate(batches).select(order)
        if metrics := [result for result in leading if isinstance(result, Metrics)]:
            return Metrics.merged(metrics)
        return leading[0] if all(result is None for result in leading) else leading

    @property
    def answering(self) -> tuple[int, ...]:
        return _data_leaders(self.layout)


class GatherRows(Protocol):
    """The same arguments to every rank; the batches of data ranks come back one after the other."""

    def distribute(self, arguments: Arguments) -> Sequence[Arguments | None]:
        return [arguments] * self.layout.num_ranks

    def collect(self, results: Sequence[object]) -> object:
        batches = [result for rank in self.answering if isinstance(result := results[rank], Batch)]
        assert len(batches) == self.layout.data, "a method called by gather_rows returns a batch on every rank"
        return Batch.concatenate(batches)

    @property
    def answering(self) -> tuple[int, ...]:
        return _data_leaders(self.layout)


def _data_leaders(layout: Layout) -> tuple[int, ...]:
    return tuple(rank for rank in range(layout.num_ranks) if layout.is_data_leader(rank))


def _row_tokens(batch: Batch) -> npt.NDArray[np.int64]:
    """Tokens of each row as far as they are known: the measure by which ranks get equal work."""
    counts = [batch[name].astype(np.int64) for name in ("prompt_tokens", "response_tokens") if name in batch.per_row]
    return np.sum(counts, axis=0) if counts else np.ones(len(batch), np.int64)
