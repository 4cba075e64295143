"""Flat buckets: which block of which tensor travels from whom to whom, and where it stands in the buffers. Pure Python.

A bucket is a few tensors that travel together. Each trainer rank (a shard) has some rows of every tensor; each engine
rank wants a box of it, and engine ranks that want the same boxes want the same part. What one shard has of one part is a
segment: a flat run of elements, block after block in the order of the tensors, that travels as one message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from hybridflow.resharding.layout import Box, shard_box

ALIGNMENT_BYTES = 16
"""Every block starts at a multiple of this, so that its bits can be read as wider words."""
Part = Mapping[str, Box]
"""What an engine reads of the tensors that it does not read whole, by name."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a bucket."""

    name: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    """What each part has of it."""

    def block(self, shard: int, num_shards: int, part: int) -> Box | None:
        """What shard number `shard` has of `part`."""
        held = shard_box(self.shape, num_shards, shard)
        return held.intersect(self.boxes[part]) if held is not None else None


@dataclass(frozen=True)
class Block:
    """A block of a tensor and its place in a flat run of elements."""

    entry: Entry
    box: Box
    offset: int


@dataclass(frozen=True)
class Segment:
    """Blocks one after the other."""

    blocks: tuple[Block, ...]
    num_elements: int
    """With the gaps that alignment leaves."""

    @staticmethod
    def of(blocks: Sequence[tuple[Entry, Box]], alignment: int) -> Segment:
        """Every block at a multiple of `alignment` elements."""
        placed: list[Block] = []
        filled = 0
        for entry, box in blocks:
            placed.append(Block(entry, box, filled))
            filled += -(-box.num_elements // alignment) * alignment
        return Segment(tuple(placed), filled)


@dataclass(frozen=True)
class Plan:
    """Everything both ends must agree on: made once from names, shapes and parts."""

    buckets: tuple[tuple[Entry, ...], ...]
    num_shards: int
    part_of: tuple[int, ...]
    """Number of the part that each engine rank reads."""
    dtype: str
    """`bfloat16` or `float32`: of the weights as they travel."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tensors in the order in which they arrive."""
        return tuple(entry for bucket in self.buckets for entry in bucket)

    @property
    def num_parts(self) -> int:
        return max(self.part_of) + 1

    def segment(self, bucket: int, shard: int, part: int) -> Segment:
        """What one shard has of one part of a bucket."""
        blocks = [(entry, entry.block(shard, self.num_shards, part)) for entry in self.buckets[bucket]]
        return Segment.of([(entry, box) for entry, box in blocks if box is not None], ALIGNMENT_BYTES // itemsize(self.dtype))

    def assembled(self, bucket: int, part: int) -> Segment:
        """All of one part of a bucket, tensor after tensor."""
        return Segment.of(
            [(entry, entry.boxes[part]) for entry in self.buckets[bucket]], ALIGNMENT_BYTES // itemsize(self.dtype)
        )

    @cached_property
    def boxes(self) -> dict[tuple[str, Box], int]:
        """The distinct boxes that are read, numbered in the order of tensors and parts."""
        distinct = dict.fromkeys((entry.name, box) for entry in self.entries for box in entry.boxes)
        return {key: number for number, key in enumerate(distinct)}

    def bytes_missing(self, part: int, shard: int | None) -> int:
        """The fewest bytes that an engine rank can receive: its part, less what the same process trains as `shard`."""
        missing = 0
        for entry in self.entries:
            own = entry.block(shard, self.num_shards, part) if shard is not None else None
            missing += entry.boxes[part].num_elements - (own.num_elements if own is not None else 0)
        return missing * itemsize(self.dtype)


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return {"bfloat16": 2, "float32": 4}[dtype]


def plan_buckets(
    shapes: Sequence[tuple[str, tuple[int, ...]]], parts: Sequence[Part], *, num_shards: int, dtype: str, bucket_bytes: int
) -> Plan:
    """Tensors in their order, as many to a bucket as fit `bucket_bytes` of an engine rank; a larger one gets its own.

    `parts` has one item for each engine rank.

    Example:
        >>> shapes = [("a", (4, 2)), ("b", (4, 2)), ("c", (4, 2))]
        >>> plan = plan_buckets(shapes, [{}], num_shards=2, dtype="float32", bucket_bytes=64)
        >>> [[entry.name for entry in bucket] for bucket in plan.buckets]  # 32 bytes each
        [['a', 'b'], ['c']]
    """
    distinct = list({tuple(sorted(part.items())): part for part in parts}.values())
    buckets: list[list[Entry]] = [[]]
    filled = 0
    for name, shape in shapes:
        whole = Box.whole(shape)
        entry = Entry(name, shape, tuple(part.get(name, whole) for part in distinct))
        size = max(_bytes_received(entry, part, num_shards, dtype) for part in range(len(distinct)))
        if buckets[-1] and filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(entry)
        filled += size
    return Plan(tuple(map(tuple, buckets)), num_shards, tuple(distinct.index(part) for part in parts), dtype)


def _bytes_received(entry: Entry, part: int, num_shards: int, dtype: str) -> int:
    """What `entry` takes of the buffer of a rank that reads `part`, with the gaps."""
    alignment = ALIGNMENT_BYTES // itemsize(dtype)
    blocks = [entry.block(shard, num_shards, part) for shard in range(num_shards)]
    return sum(-(-block.num_elements // alignment) * ALIGNMENT_BYTES for block in blocks if block is not None)
