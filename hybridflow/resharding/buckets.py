"""Flat buckets: which rows of which tensor stand where in the buffers that travel. Pure Python.

A bucket of n shards is a buffer of shape [n, shard_elements]. Row s holds the rows that rank s trains of every tensor of
the bucket, one tensor after the other at the same offsets in every row, so that one all-gather fills it and a tensor is
one strided view of it. Rows of short or empty chunks are padded at their end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from hybridflow.resharding.layout import chunk

ALIGNMENT_BYTES = 16
"""Every tensor starts at a multiple of this, so that its bits can be read as wider words."""


@dataclass(frozen=True)
class Slot:
    """The place of one tensor in a bucket."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Elements before it in each shard's row."""
    num_shards: int

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        return prod(self.shape[1:])

    @property
    def shard_elements(self) -> int:
        """Elements of a full chunk, as many as every shard's row reserves."""
        return -(-self.num_rows // self.num_shards) * self.row_elements

    def rows(self, shard: int) -> tuple[int, int]:
        """First and last row (exclusive) of the tensor that `shard` trains."""
        return chunk(self.num_rows, self.num_shards, shard)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together."""

    slots: tuple[Slot, ...]
    shard_elements: int
    """Elements of each shard's row, padding included."""
    num_shards: int

    @property
    def num_elements(self) -> int:
        return self.shard_elements * self.num_shards


@dataclass(frozen=True)
class Plan:
    """Everything both ends must agree on: made once from names and shapes."""

    buckets: tuple[Bucket, ...]
    num_shards: int
    dtype: str
    """`bfloat16` or `float32`: of the weights as they travel."""

    @property
    def slots(self) -> tuple[Slot, ...]:
        """All tensors in the order in which they arrive."""
        return tuple(slot for bucket in self.buckets for slot in bucket.slots)

    def to_json(self) -> str:
        """For the other end."""
        buckets = [
            [[slot.name, list(slot.shape), slot.offset] for slot in bucket.slots] + [bucket.shard_elements]
            for bucket in self.buckets
        ]
        return json.dumps({"num_shards": self.num_shards, "dtype": self.dtype, "buckets": buckets})

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """The plan that `to_json` wrote."""
        read = json.loads(text)
        num_shards = read["num_shards"]
        buckets = tuple(
            Bucket(tuple(Slot(name, tuple(shape), offset, num_shards) for name, shape, offset in slots), size, num_shards)
            for *slots, size in read["buckets"]
        )
        return Plan(buckets, num_shards, read["dtype"])


def itemsize(dtype: str) -> int:
    """Bytes of one element."""
    return {"bfloat16": 2, "float32": 4}[dtype]


def plan_buckets(shapes: Iterable[tuple[str, tuple[int, ...]]], *, num_shards: int, dtype: str, bucket_bytes: int) -> Plan:
    """Tensors in their order, as many to a bucket as fit `bucket_bytes`; a larger tensor gets its own."""
    alignment = ALIGNMENT_BYTES // itemsize(dtype)
    most = bucket_bytes // itemsize(dtype) // num_shards
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    filled = 0
    for name, shape in shapes:
        slot = Slot(name, shape, filled, num_shards)
        size = -(-slot.shard_elements // alignment) * alignment
        if slots and filled + size > most:
            buckets.append(Bucket(tuple(slots), filled, num_shards))
            slots, filled, slot = [], 0, Slot(name, shape, 0, num_shards)
        slots.append(slot)
        filled += size
    if slots:
        buckets.append(Bucket(tuple(slots), filled, num_shards))
    return Plan(tuple(buckets), num_shards, dtype)
