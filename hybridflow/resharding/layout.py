"""Blocks of tensors, and which one a shard of FSDP2 holds. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A block of a tensor: from `start` up to `stop` in every dim."""

    start: tuple[int, ...]
    stop: tuple[int, ...]

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        """All of a tensor."""
        return Box((0,) * len(shape), shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def num_elements(self) -> int:
        return prod(self.shape)

    def intersect(self, other: Box) -> Box | None:
        """What both have, or None."""
        start = tuple(map(max, self.start, other.start))
        stop = tuple(map(min, self.stop, other.stop))
        return Box(start, stop) if all(low < high for low, high in zip(start, stop, strict=True)) else None

    def between(self, dim: int, low: int, high: int) -> Box:
        """This box with other bounds along `dim`."""
        start = (*self.start[:dim], low, *self.start[dim + 1 :])
        return Box(start, (*self.stop[:dim], high, *self.stop[dim + 1 :]))

    def within(self, outer: Box) -> Box:
        """The same block, counted from the start of `outer`."""
        return Box(
            tuple(here - there for here, there in zip(self.start, outer.start, strict=True)),
            tuple(here - there for here, there in zip(self.stop, outer.start, strict=True)),
        )

    @property
    def slices(self) -> tuple[slice, ...]:
        """To index a tensor with."""
        return tuple(map(slice, self.start, self.stop))


def shard_box(shape: tuple[int, ...], num_shards: int, shard: int) -> Box | None:
    """What FSDP2 gives shard number `shard`: rows of dim 0, or None for none. A number without dims is the first shard's."""
    if not shape:
        return Box((), ()) if shard == 0 else None
    per_shard = -(-shape[0] // num_shards)  # as torch.chunk: rounded up, the last ones are short or empty
    box = Box.whole(shape).between(0, min(shard * per_shard, shape[0]), min((shard + 1) * per_shard, shape[0]))
    return box if box.num_elements else None
