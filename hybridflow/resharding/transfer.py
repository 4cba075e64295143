"""Carrying a sync out: trained shards into flat buckets, buckets to where the engine is, full tensors to the engine,
and fingerprints of both ends compared.

While the engine loads one bucket the next one is on its way: its collective is started before the engine is given the
first tensor, so two buckets exist at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from hybridflow.resharding.buckets import Bucket, Plan, Slot, plan_buckets
from hybridflow.resharding.checksum import Fingerprints
from hybridflow.resharding.links import Arriving, Broadcaster, TransferStore, gather, receive
from hybridflow.resharding.replay import Replay
from hybridflow.resharding.timeline import Timeline
from hybridflow.resharding.verify import DTYPES, Arrivals, HeldWeights, Place, compare

NamedTensors = Sequence[tuple[str, torch.Tensor]]


class WeightTarget(Protocol):
    """What a sync needs of an engine."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy full tensors under their Hugging Face names; each is valid until the next one is asked for."""
        ...

    def held_weights(self) -> HeldWeights:
        """This rank's part of each weight that can be read back bit by bit, under its Hugging Face name."""
        ...


@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """What holds for every sync of a run on one rank."""

    dtype: str
    """`bfloat16` or `float32`: of the engine's weights, and of everything that travels."""
    bucket_bytes: int
    verify: bool
    """Compare fingerprints after each sync."""
    device: torch.device
    place: Place
    """For messages, and for which part of a weight the engine of this rank holds."""


@dataclass(frozen=True)
class SyncReport:
    """What one sync cost on one rank."""

    bytes_received: int = 0
    """Over the wire, padding of uneven shards included."""
    num_tensors: int = 0
    unreadable: tuple[str, ...] = ()
    """Tensors that the engine keeps in a form that cannot be compared bit by bit."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of `gather`, `transfer`, `load` and `checksum`, where they occur."""


class Shards:
    """One trainer rank's part of every tensor, ready to be packed."""

    def __init__(self, plan: Plan, shard: int, settings: SyncSettings):
        self.plan, self.shard, self.settings = plan, shard, settings
        self.dtype = DTYPES[plan.dtype]
        shapes = [(slot.name, slot.shape) for slot in plan.slots]
        self.fingerprints = Fingerprints(shapes, dtype=self.dtype, device=settings.device) if settings.verify else None
        self.packing = {bucket: Replay() for bucket in plan.buckets}

    @torch.no_grad()
    def pack(self, bucket: Bucket, tensors: dict[str, torch.Tensor], into: torch.Tensor, timeline: Timeline) -> None:
        """Cast this rank's rows of a bucket into a flat row of shape [shard_elements]."""
        rows = [self.rows(slot, tensors) for slot in bucket.slots]
        views = [
            into[slot.offset : slot.offset + part.numel()].view(part.shape)
            for slot, part in zip(bucket.slots, rows, strict=True)
        ]
        self.packing[bucket].run(lambda: torch._foreach_copy_(views, rows), [into, *rows])
        timeline.mark("gather")
        self.show(list(zip(bucket.slots, views, strict=True)), timeline)

    def show(self, packed: Sequence[tuple[Slot, torch.Tensor]], timeline: Timeline) -> None:
        """Take fingerprints of what leaves."""
        if self.fingerprints is None:
            return
        self.fingerprints.add_all([(slot.name, rows, slot.rows(self.shard)[0]) for slot, rows in packed])
        timeline.mark("checksum")

    @torch.no_grad()  # in which DTensor.to_local does not go through autograd, ten times slower
    def rows(self, slot: Slot, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The rows of a tensor that this rank answers for; of a tensor that is whole on every rank, an equal share."""
        tensor = tensors[slot.name]
        start, stop = slot.rows(self.shard)
        if not isinstance(tensor, DTensor):
            return tensor[start:stop].detach() if slot.shape else tensor.detach()
        assert all(placement == Shard(0) for placement in tensor.placements), f"{slot.name} is cut as {tensor.placements}"
        local = tensor.to_local().detach()
        assert len(local) == stop - start, f"{slot.name}: rank {self.shard} holds {len(local)} rows, not {stop - start}"
        return local


class Buffers:
    """Two flat buffers that take turns, each as large as the largest bucket of its turn needs."""

    def __init__(self, plan: Plan, device: torch.device, *, rows: int):
        dtype = DTYPES[plan.dtype]
        self.rows = rows
        sizes = [max((bucket.shard_elements for bucket in plan.buckets[turn::2]), default=0) for turn in (0, 1)]
        self.flat = [torch.empty(rows * size, dtype=dtype, device=device) for size in sizes]

    def of(self, index: int, bucket: Bucket) -> torch.Tensor:
        """The buffer of bucket number `index`: shape [rows, shard_elements]."""
        flat = self.flat[index % 2][: self.rows * bucket.shard_elements]
        return flat.view(self.rows, bucket.shard_elements)


class ColocatedSync:
    """Trainer and engine in the same process on every rank of one pool."""

    def __init__(self, settings: SyncSettings, group: dist.ProcessGroup | None):
        self.settings, self.group = settings, group
        self.shards: Shards | None = None
        self.arrivals: Arrivals | None = None
        self.buffers: tuple[Buffers, Buffers] | None = None

    @property
    def plan(self) -> Plan | None:
        """How the weights travel; known after the first sync."""
        return self.shards.plan if self.shards else None

    def sync(self, tensors: NamedTensors, target: WeightTarget) -> SyncReport:
        """Give the engine the trainer's current weights. Every rank of the group calls this.

        Raises:
            WeightMismatchError: what the engine holds afterwards differs from what was trained.
        """
        shards, arrivals = self._prepared(tensors, target)
        timeline = Timeline(self.settings.device)
        named = dict(tensors)
        deliver = Delivery(shards.plan, arrivals, timeline, part="gather")
        if shards.plan.num_shards == 1 and all(self._is_ready(tensor) for tensor in named.values()):
            target.load_weights(self._as_they_are(shards, arrivals, named, timeline))
        else:
            target.load_weights(deliver.tensors(self._start(shards, named, timeline)))
        timeline.mark("load")
        if shards.fingerprints is not None:
            trained = _summed(shards.fingerprints, self.group if shards.plan.num_shards > 1 else None)
            compare(trained, arrivals, target.held_weights(), self.settings.place)
            timeline.mark("checksum")
        return SyncReport(deliver.bytes_received, len(named), arrivals.unreadable, timeline.seconds())

    def _prepared(self, tensors: NamedTensors, target: WeightTarget) -> tuple[Shards, Arrivals]:
        if self.shards is None or self.arrivals is None:
            is_cut = self.group is not None and any(isinstance(tensor, DTensor) for _, tensor in tensors)
            shard, num_shards = (self.group.rank(), self.group.size()) if self.group is not None and is_cut else (0, 1)
            plan = _plan(tensors, num_shards, self.settings)
            self.shards = Shards(plan, shard, self.settings)
            self.arrivals = Arrivals(plan, self.settings.device, self.settings.place)
        if self.shards.fingerprints is not None:
            self.shards.fingerprints.begin()
            self.arrivals.begin(target.held_weights())
        return self.shards, self.arrivals

    def _is_ready(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype == DTYPES[self.settings.dtype] and tensor.device == self.settings.device

    def _as_they_are(
        self, shards: Shards, arrivals: Arrivals, tensors: dict[str, torch.Tensor], timeline: Timeline
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """One rank, one dtype, one device: the engine copies straight from the trained tensors."""
        for slot in shards.plan.slots:
            rows = shards.rows(slot, tensors)
            timeline.mark("load")
            shards.show([(slot, rows)], timeline)
            arrivals.show(slot.name, rows)
            yield slot.name, rows

    def _start(self, shards: Shards, tensors: dict[str, torch.Tensor], timeline: Timeline) -> Callable[[int, Bucket], Arriving]:
        plan, device = shards.plan, self.settings.device
        if self.buffers is None:  # kept, since the recorded launches hold their addresses
            packing = Buffers(plan, device, rows=1)
            self.buffers = packing, Buffers(plan, device, rows=plan.num_shards) if plan.num_shards > 1 else packing
        packing, gathering = self.buffers

        def start(index: int, bucket: Bucket) -> Arriving:
            packed = packing.of(index, bucket)
            shards.pack(bucket, tensors, packed[0], timeline)
            if plan.num_shards == 1:
                return Arriving(packed)
            assert self.group is not None
            return gather(packed[0], gathering.of(index, bucket), self.group)

        return start


class WeightSender:
    """One trainer rank of a pool whose weights go to another pool. Each rank sends its own shards to all receivers, so
    nothing is gathered on this side and the load is spread over all trainers."""

    def __init__(self, settings: SyncSettings, store: TransferStore, *, rank: int, num_ranks: int):
        self.settings, self.store, self.rank, self.num_ranks = settings, store, rank, num_ranks
        self.shards: Shards | None = None
        self.group: Broadcaster | None = None
        self.buffers: Buffers | None = None

    def connect(self, tensors: NamedTensors) -> None:
        """Publish names and shapes, and join the group of this rank with all receivers."""
        is_cut = any(isinstance(tensor, DTensor) for _, tensor in tensors)
        assert is_cut or self.num_ranks == 1, "several ranks send, but hold whole tensors"
        plan = _plan(tensors, self.num_ranks, self.settings)
        self.shards = Shards(plan, self.rank, self.settings)
        if self.rank == 0:
            self.store.put("plan", plan.to_json())
        num_receivers = int(self.store.get("num_receivers"))
        self.group = self.store.group(f"shard{self.rank}", 0, num_receivers + 1)

    def send(self, tensors: NamedTensors) -> SyncReport:
        """Send the current weights. Every rank of the pool calls this while every receiver receives."""
        if self.shards is None or self.group is None:
            self.connect(tensors)
        assert self.shards is not None and self.group is not None
        if self.shards.fingerprints is not None:
            self.shards.fingerprints.begin()
        timeline = Timeline(self.settings.device)
        named = dict(tensors)
        buffers = self.buffers = self.buffers or Buffers(self.shards.plan, self.settings.device, rows=1)
        under_way: list[Arriving] = []
        for index, bucket in enumerate(self.shards.plan.buckets):
            if len(under_way) == 2:
                under_way.pop(0).wait()  # its buffer is packed again now
                timeline.mark("transfer")
            packed = buffers.of(index, bucket)
            self.shards.pack(bucket, named, packed[0], timeline)
            under_way.append(Arriving(packed, [self.group.broadcast(packed[0], 0)]))
        for arriving in under_way:
            arriving.wait()
        timeline.mark("transfer")
        if self.shards.fingerprints is not None:
            self.group.broadcast(self.shards.fingerprints.finish(), 0).wait()
            timeline.mark("checksum")
        return SyncReport(num_tensors=len(named), seconds=timeline.seconds())


class WeightReceiver:
    """One rank of a pool that generates with weights that another pool trains."""

    def __init__(self, settings: SyncSettings, store: TransferStore, *, rank: int, num_ranks: int):
        self.settings, self.store, self.rank = settings, store, rank
        if rank == 0:
            store.put("num_receivers", str(num_ranks))
        self.num_ranks = num_ranks
        self.plan: Plan | None = None
        self.buffers: Buffers | None = None
        self.groups: list[Broadcaster] = []
        self.arrivals: Arrivals | None = None

    def connect(self) -> None:
        """Learn names and shapes, and join a group with each sender."""
        self.plan = plan = Plan.from_json(self.store.get("plan"))
        self.groups = [self.store.group(f"shard{shard}", self.rank + 1, self.num_ranks + 1) for shard in range(plan.num_shards)]
        self.arrivals = Arrivals(plan, self.settings.device, self.settings.place)

    def receive(self, target: WeightTarget) -> SyncReport:
        """Give the engine what the senders send.

        Raises:
            WeightMismatchError: what the engine holds afterwards differs from what was trained.
        """
        if self.plan is None or self.arrivals is None:
            self.connect()
        assert self.plan is not None and self.arrivals is not None
        if self.settings.verify:
            self.arrivals.begin(target.held_weights())
        timeline = Timeline(self.settings.device)
        buffers = self.buffers = self.buffers or Buffers(self.plan, self.settings.device, rows=self.plan.num_shards)
        deliver = Delivery(self.plan, self.arrivals, timeline, part="transfer")
        target.load_weights(deliver.tensors(lambda index, bucket: receive(bucket, buffers.of(index, bucket), self.groups)))
        timeline.mark("load")
        if self.settings.verify:
            trained = self._trained_fingerprints()
            compare(trained, self.arrivals, target.held_weights(), self.settings.place)
            timeline.mark("checksum")
        return SyncReport(deliver.bytes_received, len(self.plan.slots), self.arrivals.unreadable, timeline.seconds())

    def _trained_fingerprints(self) -> torch.Tensor:
        assert self.plan is not None
        shape = (len(self.groups), len(self.plan.slots))
        parts = torch.zeros(shape, dtype=torch.int64, device=self.settings.device)
        for work in [group.broadcast(parts[shard], 0) for shard, group in enumerate(self.groups)]:
            work.wait()
        return parts.sum(0)


class Delivery:
    """Hands the tensors of arriving buckets out, one bucket ahead on the wire."""

    def __init__(self, plan: Plan, arrivals: Arrivals, timeline: Timeline, *, part: str):
        self.plan, self.arrivals, self.timeline, self.part = plan, arrivals, timeline, part
        self.bytes_received = 0

    def tensors(self, start: Callable[[int, Bucket], Arriving]) -> Iterator[tuple[str, torch.Tensor]]:
        """Full tensors in the order of the plan; each is valid until the next one is asked for."""
        buckets = self.plan.buckets
        arriving = start(0, buckets[0])
        for index, bucket in enumerate(buckets):
            following = start(index + 1, buckets[index + 1]) if index + 1 < len(buckets) else None
            arriving.wait()
            self.bytes_received += arriving.bytes_received
            self.timeline.mark(self.part)
            for slot in bucket.slots:
                whole = arriving.tensor(slot)
                if whole.data_ptr() != arriving.flat.data_ptr() + slot.offset * whole.element_size():
                    self.timeline.mark(self.part)
                if self.arrivals.show(slot.name, whole):
                    self.timeline.mark("checksum")
                yield slot.name, whole
            self.timeline.mark("load")
            if following is not None:
                arriving = following


def _plan(tensors: NamedTensors, num_shards: int, settings: SyncSettings) -> Plan:
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
    return plan_buckets(shapes, num_shards=num_shards, dtype=settings.dtype, bucket_bytes=settings.bucket_bytes)


def _summed(fingerprints: Fingerprints, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Fingerprints of whole tensors, from those of every rank's rows."""
    sums = fingerprints.finish()
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums
