"""Checksums of weights: one 64-bit number per tensor that changes with any bit and any exchange of elements.

A tensor is read as a matrix of machine words x_rc over dim 0 and the rest; its checksum is
sum over r and c of a_r b_c x_rc modulo 2^64, with a and b odd pseudo-random numbers. Sums over parts of the rows add up
to the checksum of the whole, so ranks that hold shards need to exchange one number per tensor only. Nothing is
copied to the host but these numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hybridflow.resharding.recorded import Replay
from hybridflow.rollout.seeds import mix

K = TypeVar("K", bound=Hashable)
"""What names a tensor."""
WORDS_AT_ONCE = 1 << 23
"""Words multiplied at a time: bounds the temporary to 64 MiB."""


class Checksums(Generic[K]):
    """Checksums of a fixed list of tensors, which are shown to it one at a time, whole or in parts of their rows."""

    def __init__(self, shapes: Sequence[tuple[K, tuple[int, ...]]], *, dtype: torch.dtype, device: torch.device):
        self.names = tuple(name for name, _ in shapes)
        rows = np.array([_matrix_shape(shape)[0] for _, shape in shapes], np.int64)
        ends = np.cumsum(rows)
        self._starts: Mapping[K, int] = dict(zip(self.names, (ends - rows).tolist(), strict=True))
        self._ends, self._starts_on_device = torch.from_numpy(ends).to(device), torch.from_numpy(ends - rows).to(device)
        row_of = np.arange(rows.sum()) - np.repeat(ends - rows, rows)
        self._row_weights = torch.from_numpy(odd_numbers(int(rows.max(initial=0)), stream=1)[row_of]).to(device)
        widest = max((_matrix_shape(shape)[1] for _, shape in shapes), default=0)
        self._column_weights = torch.from_numpy(odd_numbers(widest, stream=2)).to(device)
        self._row_sums = torch.zeros(int(rows.sum()), dtype=torch.int64, device=device)
        self._dtype = dtype
        self._seen: set[K] = set()
        self._replays: dict[tuple[K, ...], Replay] = {}

    def begin(self) -> None:
        """Forget what was shown."""
        self._row_sums.zero_()
        self._seen.clear()

    @property
    def unseen(self) -> tuple[K, ...]:
        """Tensors not shown since `begin`."""
        return tuple(name for name in self.names if name not in self._seen)

    def add(self, name: K, tensor: torch.Tensor, *, first_row: int = 0) -> None:
        """Show a tensor, or consecutive rows of it that begin at `first_row`."""
        self._check(name, tensor)
        self._sum_rows(name, tensor, first_row)

    def add_all(self, parts: Sequence[tuple[K, torch.Tensor, int]]) -> None:
        """Show many (name, tensor, first row) at once. Cheap where the same ones, at the same addresses, come every time."""
        for name, tensor, _ in parts:
            self._check(name, tensor)

        def sum_all() -> None:
            for name, tensor, first_row in parts:
                self._sum_rows(name, tensor, first_row)

        replay = self._replays.setdefault(tuple(name for name, _, _ in parts), Replay())
        replay.run(sum_all, [tensor for _, tensor, _ in parts])

    def _check(self, name: K, tensor: torch.Tensor) -> None:
        assert tensor.dtype == self._dtype, f"{name} is {tensor.dtype}, checksums are of {self._dtype}"
        self._seen.add(name)

    @torch.no_grad()
    def _sum_rows(self, name: K, tensor: torch.Tensor, first_row: int) -> None:
        if not tensor.numel():
            return
        words_RC = _words(tensor)
        start = self._starts[name] + first_row
        sums_R = self._row_sums[start : start + len(words_RC)]
        if words_RC.shape[1] == 1:
            sums_R.copy_(words_RC[:, 0])
            return
        weights_C = self._column_weights[: words_RC.shape[1]]
        rows_at_once = max(1, WORDS_AT_ONCE // words_RC.shape[1])
        for low in range(0, len(words_RC), rows_at_once):
            part = slice(low, low + rows_at_once)
            torch.sum(words_RC[part] * weights_C, dim=1, out=sums_R[part])

    @torch.no_grad()
    def finish(self) -> torch.Tensor:
        """Shape [tensors], int64, in the order of the names. Integer sums wrap around, so any order of adding is exact."""
        running = torch.cumsum(self._row_sums * self._row_weights, dim=0)
        running = torch.cat([running.new_zeros(1), running])
        return running[self._ends] - running[self._starts_on_device]


def odd_numbers(count: int, *, stream: int) -> npt.NDArray[np.int64]:
    """Pseudo-random odd 64-bit numbers: splitmix64 of (stream, index), Steele et al. 2014."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = (np.arange(1, count + 1, dtype=np.uint64) + np.array(stream, np.uint64) * np.uint64(1 << 40)) * golden
    return (mix(state) | np.uint64(1)).view(np.int64)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as a matrix [rows, words], in the widest integer that divides a row, so that few are multiplied."""
    rows, columns = _matrix_shape(tuple(tensor.shape))
    matrix = tensor.detach().reshape(rows, columns).contiguous()
    row_bytes = columns * matrix.element_size()
    size = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
    if matrix.storage_offset() * matrix.element_size() % size:
        matrix = matrix.clone()  # a wider view must start at a multiple of its width
    return matrix.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[size])
