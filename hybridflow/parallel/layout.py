"""A layout: how a model and its rows are sharded over the ranks of a pool. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes. Ranks are numbered with the tensor axis fastest, then sequence, then data; `tensor_stride` moves
    ranks that share matrices apart.

    >>> layout = Layout(data=2, sequence=2)
    >>> [(layout.data_rank(rank), layout.sequence_rank(rank)) for rank in range(4)]
    [(0, 0), (0, 1), (1, 0), (1, 1)]
    >>> engines = Layout(data=2, tensor=2, tensor_stride=2)
    >>> [(engines.data_rank(rank), engines.tensor_rank(rank)) for rank in range(4)]
    [(0, 0), (1, 0), (0, 1), (1, 1)]
    """

    data: int = 1
    """Replicas that get different rows; FSDP2 shards weights over data x sequence."""
    sequence: int = 1
    """Ranks that share the tokens of one row (Ulysses)."""
    tensor: int = 1
    """Ranks that share each weight matrix."""
    tensor_stride: int = 1
    """Distance of ranks that share a matrix; divides data x sequence."""

    def __post_init__(self) -> None:
        assert self.data * self.sequence % self.tensor_stride == 0, "the stride does not divide data x sequence"

    @property
    def num_ranks(self) -> int:
        return self.data * self.sequence * self.tensor

    def data_rank(self, rank: int) -> int:
        """Which share of the rows rank `rank` works on."""
        return self._index_without_tensor(rank) // self.sequence

    def sequence_rank(self, rank: int) -> int:
        """Position of `rank` on the sequence axis."""
        return self._index_without_tensor(rank) % self.sequence

    def tensor_rank(self, rank: int) -> int:
        """Position of `rank` on the tensor axis."""
        return rank % (self.tensor * self.tensor_stride) // self.tensor_stride

    def _index_without_tensor(self, rank: int) -> int:
        return rank // (self.tensor * self.tensor_stride) * self.tensor_stride + rank % self.tensor_stride

    def is_data_leader(self, rank: int) -> bool:
        """Whether `rank` answers for its data rank: the first on the other axes."""
        return self.sequence_rank(rank) == 0 and self.tensor_rank(rank) == 0
