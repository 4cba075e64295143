"""Which part of each weight a rank holds, in training and in generation, for any layout of the paper.

Ranks of a training layout are numbered with the tensor axis fastest, then pipeline, then data, as in HybridFlow,
section 5.3: one data replica is a block of consecutive ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from hybridflow.resharding.layout import Box, shard_box

Grouping = Literal["interval", "consecutive"]


@dataclass(frozen=True)
class TensorSpec:
    """A weight, as far as cutting it is concerned."""

    name: str
    shape: tuple[int, ...]
    itemsize: int
    """Bytes of one element as it travels."""
    tensor_dim: int | None = None
    """The dim that tensor parallelism cuts; None where every tensor rank holds the whole."""
    layer: int = 0
    """Position in the model, from 0; decides the pipeline stage."""


def chunk(size: int, num_parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` of `size` rows, as torch.chunk cuts: of equal, rounded-up size, the last ones short or
    empty."""
    per_part = -(-size // num_parts)
    return min(index * per_part, size), min((index + 1) * per_part, size)


def chunk_box(box: Box, dim: int, num_parts: int, index: int) -> Box:
    """Chunk `index` of a box along `dim`."""
    low, high = chunk(box.stop[dim] - box.start[dim], num_parts, index)
    return box.between(dim, box.start[dim] + low, box.start[dim] + high)


class WeightLayout(Protocol):
    """How a list of weights is cut over ranks."""

    @property
    def ranks(self) -> range:
        """The ranks that take part."""
        ...

    def box(self, tensor: TensorSpec, rank: int) -> Box | None:
        """What `rank` holds of `tensor`; None for nothing."""
        ...

    def replica(self, rank: int) -> int:
        """Which copy of the model `rank` belongs to: the ranks of one replica hold every weight together."""
        ...


@dataclass(frozen=True, kw_only=True)
class FsdpLayout:
    """FSDP2: every weight cut along dim 0 over all ranks."""

    num_ranks: int
    first_rank: int = 0

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.num_ranks)

    def box(self, tensor: TensorSpec, rank: int) -> Box | None:
        return shard_box(tensor.shape, self.num_ranks, rank - self.first_rank)

    def replica(self, rank: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class TrainingLayout:
    """Pipeline x tensor x data (p-t-d of the paper), weights replicated over the data axis."""

    pipeline: int = 1
    tensor: int = 1
    data: int = 1
    num_layers: int = 1
    """Layers of the model; stage s holds those with `layer * pipeline // num_layers == s`."""
    first_rank: int = 0

    @property
    def ranks(self) -> range:
        return range(self.first_rank, self.first_rank + self.pipeline * self.tensor * self.data)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Position of `rank` on the data, pipeline and tensor axes."""
        local = rank - self.first_rank
        return local // (self.tensor * self.pipeline), local // self.tensor % self.pipeline, local % self.tensor

    def box(self, tensor: TensorSpec, rank: int) -> Box | None:
        _, stage, index = self.coordinates(rank)
        return _cut(tensor, (stage, self.pipeline, self.num_layers), (index, self.tensor))

    def replica(self, rank: int) -> int:
        return self.coordinates(rank)[0]


@dataclass(frozen=True, kw_only=True)
class GenerationLayout:
    """p_g-t_g-d_g-d of the paper, on the ranks of a training layout: every replica of training becomes d_g replicas of
    generation, d_g = p t / (p_g t_g).

    `interval` grouping is the paper's: tensor groups take ranks at interval t / t_g, pipeline groups at p / p_g, so that
    what a rank trains lies inside what it generates with, and micro-data groups are consecutive ranks. `consecutive`
    is how most systems number ranks (the paper's "vanilla"): a tensor group is t_g ranks in a row.
    """

    training: TrainingLayout
    """Its tensor and pipeline sizes must be multiples of those of generation. FSDP2 over n ranks that also hold the
    engines stands here as `TrainingLayout(tensor=n)`."""
    tensor: int = 1
    pipeline: int = 1
    grouping: Grouping = "interval"

    def __post_init__(self) -> None:
        fits = self.training.tensor % self.tensor == 0 and self.training.pipeline % self.pipeline == 0
        assert fits, "generation must divide training on both axes"

    @property
    def ranks(self) -> range:
        return self.training.ranks

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Position of `rank` in its replica of training: micro-data rank, generation stage, generation tensor rank."""
        _, stage, index = self.training.coordinates(rank)
        stages, indices = self.training.pipeline // self.pipeline, self.training.tensor // self.tensor
        if self.grouping == "interval":
            return stage % stages * indices + index % indices, stage // stages, index // indices
        return stage // self.pipeline * indices + index // self.tensor, stage % self.pipeline, index % self.tensor

    def box(self, tensor: TensorSpec, rank: int) -> Box | None:
        _, stage, index = self.coordinates(rank)
        return _cut(tensor, (stage, self.pipeline, self.training.num_layers), (index, self.tensor))

    def replica(self, rank: int) -> int:
        num_micro = self.training.pipeline * self.training.tensor // (self.pipeline * self.tensor)
        return self.training.replica(rank) * num_micro + self.coordinates(rank)[0]

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that share one stage of one replica, each group in the order of its tensor ranks."""
        return self._grouped(lambda rank: (self.replica(rank), self.coordinates(rank)[1]))

    def micro_data_groups(self) -> list[list[int]]:
        """Ranks of one training replica that generate with the same slice; one all-gather in each is the transition."""
        return self._grouped(lambda rank: (self.training.replica(rank), *self.coordinates(rank)[1:]))

    def _grouped(self, key: _Key) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in self.ranks:
            groups.setdefault(key(rank), []).append(rank)
        return sorted(groups.values())


class _Key(Protocol):
    def __call__(self, rank: int) -> tuple[int, ...]: ...


def _cut(tensor: TensorSpec, pipeline: tuple[int, int, int], along_tensor: tuple[int, int]) -> Box | None:
    """The box at (stage, stages, layers) and (index, parts), or None."""
    stage, num_stages, num_layers = pipeline
    if num_stages > 1:
        assert tensor.layer < num_layers, f"{tensor.name} is of layer {tensor.layer}, the layout of {num_layers} layers"
        if tensor.layer * num_stages // num_layers != stage:
            return None
    whole = Box.whole(tensor.shape)
    if tensor.tensor_dim is None:
        return whole
    index, parts = along_tensor
    box = chunk_box(whole, tensor.tensor_dim, parts, index)
    return box if box.num_elements else None
