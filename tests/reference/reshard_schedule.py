"""The shortest schedule of sends from one layout of weights to another, to compare the plan of a sync with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from hybridflow.resharding.layout import Box
from tests.reference.weight_layouts import TensorSpec, WeightLayout


@dataclass(frozen=True)
class Send:
    """One block of one tensor on its way."""

    source: int
    destination: int
    tensor: str
    box: Box
    num_bytes: int


@dataclass(frozen=True)
class Schedule:
    """What has to travel so that every rank ends with its slice. Blocks a rank already holds are not in it."""

    sends: tuple[Send, ...]

    @cached_property
    def _totals(self) -> tuple[dict[int, int], dict[int, int]]:
        sent: dict[int, int] = defaultdict(int)
        received: dict[int, int] = defaultdict(int)
        for send in self.sends:
            sent[send.source] += send.num_bytes
            received[send.destination] += send.num_bytes
        return sent, received

    def bytes_sent(self, rank: int) -> int:
        """Bytes that leave `rank`."""
        return self._totals[0].get(rank, 0)

    def bytes_received(self, rank: int) -> int:
        """Bytes that reach `rank`."""
        return self._totals[1].get(rank, 0)


def schedule(training: WeightLayout, generation: WeightLayout, tensors: Sequence[TensorSpec]) -> Schedule:
    """The sends that turn `training` into `generation`: each missing block once, from its own replica where that has it,
    and from the source that has sent least so far."""
    sends: list[Send] = []
    sent: dict[int, int] = defaultdict(int)
    for tensor in tensors:
        holders = _holders(training, tensor)
        for destination in generation.ranks:
            needed = generation.box(tensor, destination)
            for box, ranks in holders.items():
                part = box.intersect(needed) if needed is not None else None
                if part is None or destination in ranks:
                    continue
                source = _source(training, ranks, destination, sent)
                num_bytes = part.num_elements * tensor.itemsize
                sends.append(Send(source, destination, tensor.name, part, num_bytes))
                sent[source] += num_bytes
    return Schedule(tuple(sends))


def _holders(layout: WeightLayout, tensor: TensorSpec) -> dict[Box, list[int]]:
    """The distinct blocks of a tensor and who holds each."""
    holders: dict[Box, list[int]] = {}
    for rank in layout.ranks:
        if (box := layout.box(tensor, rank)) is not None:
            holders.setdefault(box, []).append(rank)
    held = sum(box.num_elements for box in holders)
    assert held == prod(tensor.shape), f"{tensor.name}: blocks of {held} elements do not tile {tensor.shape}"
    return holders


def _source(layout: WeightLayout, ranks: Iterable[int], destination: int, sent: dict[int, int]) -> int:
    candidates = list(ranks)
    if destination in layout.ranks:
        near = [rank for rank in candidates if layout.replica(rank) == layout.replica(destination)]
        candidates = near or candidates
    return min(candidates, key=lambda rank: (sent[rank], abs(rank - destination)))
