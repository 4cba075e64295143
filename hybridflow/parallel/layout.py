"""A layout: how a model and its rows are cut over the ranks of a pool. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes. Ranks are numbered with the tensor axis fastest, then sequence, then data."""

    data: int = 1
    """Replicas that get different rows; FSDP2 shards weights over data x sequence."""
    sequence: int = 1
    """Ranks that share the tokens of one row (Ulysses)."""
    tensor: int = 1
    """Ranks that share each weight matrix."""

    @property
    def num_ranks(self) -> int:
        return self.data * self.sequence * self.tensor

    def data_rank(self, rank: int) -> int:
        """Which share of the rows rank `rank` works on."""
        return rank // (self.sequence * self.tensor)

    def sequence_rank(self, rank: int) -> int:
        """Position of `rank` on the sequence axis."""
        return rank // self.tensor % self.sequence

    def tensor_rank(self, rank: int) -> int:
        """Position of `rank` on the tensor axis."""
        return rank % self.tensor

    def is_data_leader(self, rank: int) -> bool:
        """Whether `rank` answers for its data rank: the first on the other axes."""
        return self.sequence_rank(rank) == 0 and self.tensor_rank(rank) == 0
