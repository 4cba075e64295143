"""A batch: rows with named columns, some of them here, some of them wherever they were computed.

Columns come in three kinds: one number per row (`per_row`, always at hand), a ragged run of numbers per row (`Ragged`,
no padding), and one Python object per row. The last two live in *shards*: tables that sit in the memory of whoever
computed them or in an object store. On the controller a batch is a handle: per-row columns plus, for each set of shards,
the position of every row. Select, reorder, repeat, split, concatenate and join rewrite positions and move no data;
reading a column that is elsewhere fetches it, once, without copying where the rows stand in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hybridflow.columns import writer_of
from hybridflow.errors import BatchError

Array = npt.NDArray[Any]  # columns.py says which dtype each column has
Positions = range | npt.NDArray[np.int32]

# Mean tokens per row from which copying row by row is faster than one indexed copy: equal at 16, 4 times faster at 64.
COPY_ROWS_FROM = 16


@dataclass(frozen=True)
class Ragged:
    """One run of numbers per row, all runs in one array without padding.

    Row `i` is `values[offsets[i]:offsets[i + 1]]`.

    Example:
        >>> rows = Ragged.from_rows([[5, 6, 7], [], [8]], np.int64)
        >>> rows.values, rows.offsets, rows.lengths
        (array([5, 6, 7, 8]), array([0, 3, 3, 4]), array([3, 0, 1]))
    """

    values: Array
    """Shape [T], T the number of tokens of all rows."""
    offsets: npt.NDArray[np.int64]
    """Shape [B + 1], rising from 0 to T."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Shape [B]: tokens per row."""
        return np.diff(self.offsets)

    @staticmethod
    def from_rows(rows: Sequence[Array | Sequence[float]], dtype: npt.DTypeLike) -> Ragged:
        """From one array per row."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
        return Ragged(values, offsets)

    @staticmethod
    def from_lengths(values: Array, lengths: npt.NDArray[np.integer]) -> Ragged:
        """From all values in one array and the number of them in each row."""
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        assert offsets[-1] == len(values), f"lengths add up to {offsets[-1]}, but there are {len(values)} values"
        return Ragged(values, offsets)

    def where(self, mask: npt.NDArray[np.bool_]) -> Ragged:
        """Of each row the numbers at which `mask`, of the shape of `values`, is true.

        Example:
            >>> Ragged.from_rows([[5, 6, 7], [8]], np.int64).where(np.array([True, False, True, False])).lengths
            array([2, 0])
        """
        kept = np.concatenate([[0], np.cumsum(mask)])
        return Ragged(self.values[mask], kept[self.offsets])

    def spread(self, mask: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> Ragged:
        """The inverse of `where`: rows of `offsets` with these numbers where `mask` is true, and 0 elsewhere.

        Example:
            >>> Ragged.from_rows([[5], [8]], np.int64).spread(np.array([False, True, True]), np.array([0, 2, 3])).values
            array([0, 5, 8])
        """
        values = np.zeros(len(mask), self.values.dtype)
        values[mask] = self.values
        return Ragged(values, offsets)

    def take(self, positions: Positions) -> Ragged:
        """The rows at `positions`; a view where they are a range, else a copy.

        Example:
            >>> [row.tolist() for row in Ragged.from_rows([[5, 6], [7]], np.int64).take(np.array([1, 0, 1], np.int32))]
            [[7], [5, 6], [7]]
        """
        if isinstance(positions, range):
            offsets = self.offsets[positions.start : positions.stop + 1]
            return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
        lengths = self.lengths[positions]
        offsets = np.zeros(len(positions) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        if offsets[-1] > COPY_ROWS_FROM * len(positions):
            rows = [self.values[self.offsets[row] : self.offsets[row + 1]] for row in positions]
            return Ragged(np.concatenate(rows), offsets)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][positions] - offsets[:-1], lengths)
        return Ragged(self.values[index], offsets)


ShardColumn = Ragged | list[object]


class Shard(Protocol):
    """A table of per-token columns and texts, here or elsewhere."""

    @property
    def num_rows(self) -> int:
        """How many rows it has, known without fetching."""
        ...

    def fetch(self) -> Mapping[str, ShardColumn]:
        """Its columns, read-only."""
        ...


@dataclass(frozen=True)
class LocalShard:
    """A shard in this process."""

    columns: Mapping[str, ShardColumn]
    num_rows: int

    def fetch(self) -> Mapping[str, ShardColumn]:
        return self.columns


@dataclass(frozen=True)
class Source:
    """Some per-token columns or texts of a batch: shards, and where in them each row stands."""

    names: tuple[str, ...]
    shards: tuple[Shard, ...]
    positions: Positions
    """Row of the batch -> row of the shards laid end to end."""

    def take(self, rows: npt.NDArray[np.int32]) -> Source:
        """The given rows, with the shards that no row stands in left out."""
        return Source(self.names, self.shards, _as_range(_as_array(self.positions)[rows]))._pruned()

    def _pruned(self) -> Source:
        starts = np.cumsum([0, *(shard.num_rows for shard in self.shards)])
        positions = _as_array(self.positions)
        home = np.searchsorted(starts, positions, side="right") - 1
        used = np.unique(home) if len(home) else np.array([0])  # one shard stays: it knows the kinds of the columns
        if len(used) == len(self.shards):
            return self
        shift = np.zeros(len(self.shards), np.int64)
        shift[used] = starts[used] - np.cumsum([0, *(self.shards[shard].num_rows for shard in used[:-1])])
        moved = (positions - shift[home]).astype(np.int32)
        return Source(self.names, tuple(self.shards[shard] for shard in used), _as_range(moved))

    def read(self, name: str) -> ShardColumn:
        """The column's rows in the order of the batch."""
        parts = [shard.fetch()[name] for shard in self.shards]
        if ragged := [part for part in parts if isinstance(part, Ragged)]:
            whole = ragged[0] if len(ragged) == 1 else _concatenate_ragged(ragged)
            return (
                whole
                if isinstance(self.positions, range) and self.positions == range(len(whole))
                else whole.take(self.positions)
            )
        objects = [value for part in parts for value in part]
        return [objects[position] for position in self.positions]


@dataclass(frozen=True)
class Batch:
    """Rows with named columns. Immutable: every method returns a new batch and moves no data of shards."""

    per_row: Mapping[str, Array] = field(default_factory=dict)
    """One number per row, always at hand: name -> array of shape [B]."""
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        sizes = {name: len(column) for name, column in self.per_row.items()}
        sizes |= {"/".join(source.names): len(source.positions) for source in self.sources}
        if len(set(sizes.values())) > 1:
            raise BatchError(f"the columns of a batch must have the same number of rows; found {sizes}")

    @staticmethod
    def from_columns(columns: Mapping[str, Array | ShardColumn]) -> Batch:
        """A batch whose data is in this process. Arrays become per-row columns, `Ragged` and lists a shard.

        Example:
            >>> responses = Ragged.from_rows([[5, 6], [7]], np.int32)
            >>> batch = Batch.from_columns({"reward": np.array([1.0, 0.0]), "response": responses})
            >>> batch["reward"], batch.tokens("response").lengths
            (array([1., 0.]), array([2, 1]))
        """
        per_row = {name: column for name, column in columns.items() if isinstance(column, np.ndarray)}
        in_shard = {name: column for name, column in columns.items() if isinstance(column, Ragged | list)}
        if not in_shard:
            return Batch(per_row)
        num_rows = len(next(iter(in_shard.values())))
        for name, column in in_shard.items():
            if len(column) != num_rows:
                raise BatchError(f"column {name!r} has {len(column)} rows, the columns before it {num_rows}")
        return Batch(per_row, (Source(tuple(in_shard), (LocalShard(in_shard, num_rows),), range(num_rows)),))

    def __len__(self) -> int:
        if self.per_row:
            return len(next(iter(self.per_row.values())))
        return len(self.sources[0].positions) if self.sources else 0

    def __contains__(self, name: str) -> bool:
        return name in self.names

    @property
    def names(self) -> tuple[str, ...]:
        """All columns, per-row ones first."""
        return (*self.per_row, *(name for source in self.sources for name in source.names))

    def __getitem__(self, name: str) -> Array:
        """A per-row column: shape [B].

        Raises:
            BatchError: there is no such column, or it is in shards.
        """
        if name in self.per_row:
            return self.per_row[name]
        if name in self.names:
            raise BatchError(
                f"column {name!r} has token-level data or text, which stays where it was computed. Compute with it on "
                f"the ranks: group.compute(batch, function), or in a worker batch.tokens({name!r}) and batch.objects({name!r})"
            )
        raise self._missing(name)

    def tokens(self, name: str) -> Ragged:
        """A ragged column in the order of the rows; fetched where it is elsewhere, and not copied where it is whole.

        Raises:
            BatchError: there is no such column, or it is not ragged.
        """
        column = self._in_shards(name)
        if not isinstance(column, Ragged):
            raise BatchError(f"column {name!r} holds one object per row; read it with batch.objects({name!r})")
        return column

    def objects(self, name: str) -> list[object]:
        """A column of one object per row, likewise."""
        column = self._in_shards(name)
        if isinstance(column, Ragged):
            raise BatchError(f"column {name!r} holds tokens; read it with batch.tokens({name!r})")
        return column

    def _in_shards(self, name: str) -> ShardColumn:
        for source in self.sources:
            if name in source.names:
                return source.read(name)
        if name in self.per_row:
            raise BatchError(f"column {name!r} holds one number per row; read it with batch[{name!r}]")
        raise self._missing(name)

    def _missing(self, name: str) -> BatchError:
        return BatchError(
            f"column {name!r} is missing: {writer_of(name)}. The batch has {', '.join(self.names) or 'no columns'}"
        )

    def select(self, rows: Sequence[int] | Array) -> Batch:
        """The given rows in the given order, repeats allowed.

        Example:
            >>> Batch({"reward": np.array([1.0, 0.5, 0.0])}).select([2, 0, 2])["reward"]
            array([0., 1., 0.])
        """
        index = np.asarray(rows, np.int32)
        return Batch({name: column[index] for name, column in self.per_row.items()}, tuple(s.take(index) for s in self.sources))

    def split(self, rows_per_part: int) -> list[Batch]:
        """Consecutive parts of `rows_per_part` rows; the last may be smaller.

        Example:
            >>> [len(part) for part in Batch({"reward": np.zeros(5)}).split(2)]
            [2, 2, 1]
        """
        return [
            self.select(np.arange(start, min(start + rows_per_part, len(self)))) for start in range(0, len(self), rows_per_part)
        ]

    def repeat(self, times: int) -> Batch:
        """Every row `times` times in a row, column `sample` counting from 0 within each.

        Example:
            >>> rows = Batch({"prompt_id": np.array([7, 9])}).repeat(2)
            >>> rows["prompt_id"], rows["sample"]
            (array([7, 7, 9, 9]), array([0, 1, 0, 1]))
        """
        repeated = self.select(np.repeat(np.arange(len(self)), times))
        return repeated.with_columns(sample=np.tile(np.arange(times), len(self)))

    def with_columns(self, **columns: Array) -> Batch:
        """With per-row columns added or replaced: arrays of shape [B]."""
        return Batch({**self.per_row, **columns}, self.sources)

    def without(self, names: Sequence[str]) -> Batch:
        """Without the columns of these names."""
        kept = [Source(tuple(n for n in s.names if n not in names), s.shards, s.positions) for s in self.sources]
        per_row = {name: column for name, column in self.per_row.items() if name not in names}
        return Batch(per_row, tuple(source for source in kept if source.names))

    def join(self, *others: Batch) -> Batch:
        """With the columns of other batches about the same rows in the same order; a column of a later batch wins.

        Example:
            >>> Batch({"reward": np.array([1.0])}).join(Batch({"kl": np.array([0.1])})).names
            ('reward', 'kl')
        """
        per_row, sources = dict(self.per_row), list(self.sources)
        for other in others:
            if len(other) != len(self):
                raise BatchError(f"join needs the same rows; this batch has {len(self)}, the other {len(other)}")
            per_row |= other.per_row
            replaced = {name for source in other.sources for name in source.names}
            kept = [Source(tuple(n for n in s.names if n not in replaced), s.shards, s.positions) for s in sources]
            sources = [source for source in kept if source.names] + list(other.sources)
        return Batch(per_row, tuple(sources))

    @staticmethod
    def concatenate(batches: Sequence[Batch]) -> Batch:
        """The rows of all batches, one batch after the other. All must have the same columns, but for metrics of rows
        (names with a slash): they are NaN where a batch lacks them, since a reward function may return others for other rows.

        Example:
            >>> first, second = {"reward": np.array([1.0])}, {"reward": np.array([0.0]), "reward/length": np.array([3.0])}
            >>> Batch.concatenate([Batch(first), Batch(second)])["reward/length"]
            array([nan,  3.])
        """
        filled = _with_all_metrics([batch for batch in batches if len(batch)])
        if not filled:
            return batches[0] if batches else Batch()
        first = filled[0]
        for batch in filled[1:]:
            if set(batch.names) != set(first.names):
                odd = sorted(set(batch.names) ^ set(first.names))
                raise BatchError(f"batches to concatenate must have the same columns; only some have {', '.join(odd)}")
        per_row = {name: np.concatenate([batch.per_row[name] for batch in filled]) for name in first.per_row}
        return Batch(per_row, tuple(_concatenate_sources(filled)))


def _with_all_metrics(batches: Sequence[Batch]) -> list[Batch]:
    names = dict.fromkeys(name for batch in batches for name in batch.per_row if "/" in name)
    return [
        batch.with_columns(**{name: np.full(len(batch), np.nan, np.float32) for name in names if name not in batch.per_row})
        for batch in batches
    ]


def _concatenate_sources(batches: Sequence[Batch]) -> Iterator[Source]:
    """One source for each set of columns that comes from the same source in every batch."""
    homes = [{name: index for index, source in enumerate(batch.sources) for name in source.names} for batch in batches]
    by_home: dict[tuple[int, ...], list[str]] = {}
    for name in homes[0]:
        by_home.setdefault(tuple(home[name] for home in homes), []).append(name)
    for indices, names in by_home.items():
        shards: list[Shard] = []
        positions: list[npt.NDArray[np.int32]] = []
        start = 0
        for batch, index in zip(batches, indices, strict=True):
            source = batch.sources[index]
            positions.append(_as_array(source.positions) + np.int32(start))
            shards.extend(source.shards)
            start += sum(shard.num_rows for shard in source.shards)
        yield Source(tuple(names), tuple(shards), _as_range(np.concatenate(positions)))


def _concatenate_ragged(parts: Iterable[Ragged]) -> Ragged:
    whole = list(parts)
    return Ragged.from_lengths(
        np.concatenate([part.values for part in whole]), np.concatenate([part.lengths for part in whole])
    )


def _as_array(positions: Positions) -> npt.NDArray[np.int32]:
    return np.arange(positions.start, positions.stop, dtype=np.int32) if isinstance(positions, range) else positions


def _as_range(positions: npt.NDArray[np.int32]) -> Positions:
    """A range where the positions are consecutive: it takes no space in a message and reads without a copy."""
    if not len(positions):
        return range(0)
    if np.array_equal(positions, np.arange(positions[0], positions[0] + len(positions))):
        return range(int(positions[0]), int(positions[0]) + len(positions))
    return positions
