"""Carrying a sync out: trained shards into flat segments, segments to where the engine is, tensors to the engine, and
checksums of both ends compared.

While the engine loads one bucket the next one is on its way: its messages are started before the engine is given the first
tensor, so two buckets exist at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hybridflow.resharding.buckets import Entry, Part, Plan, plan_buckets
from hybridflow.resharding.layout import Box
from hybridflow.resharding.links import TransferStore, UnderWay, exchange, gather, receive
from hybridflow.resharding.pack import Assembler, NamedTensors, Packer, flat_runs, storage_bytes
from hybridflow.resharding.partial_tensor import dry_run_load
from hybridflow.resharding.recorded import CudaRecording, Loads
from hybridflow.resharding.timeline import Timeline
from hybridflow.resharding.verify import DTYPES, Place, Verifier
from hybridflow.rollout.base import Engine

Shapes = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class SyncSettings:
    """What holds for every sync of a run on one rank."""

    dtype: str
    """`bfloat16` or `float32`: of the engine's weights, and of everything that travels."""
    bucket_bytes: int
    verify: bool
    """Compare checksums after each sync."""
    device: torch.device
    place: Place

    def plan(self, shapes: Shapes, parts: Sequence[Part], num_shards: int) -> Plan:
        """How weights of these shapes travel to ranks that read these parts."""
        return plan_buckets(shapes, parts, num_shards=num_shards, dtype=self.dtype, bucket_bytes=self.bucket_bytes)

    def only_launches(self, target: Engine) -> bool:
        """Whether the engine's loading is launches of copies, which can be made again, and then forgetting prefixes."""
        return self.device.type == "cuda" and target.can_replay_loads

    def after_tensors(self, target: Engine) -> Literal["reset", "load"]:
        """The part of the sync in which the engine's loading is after its last tensor. Engines that do more than launch copies
        may have more to load then, and what they take to forget prefixes is not told apart."""
        return "reset" if self.only_launches(target) else "load"

    def loads(self, plan: Plan, verifier: Verifier, target: Engine) -> Loads:
        """How the engine loads: recorded where device and engine can, every weight is read back afterwards, and no other rank
        waits for this one meanwhile."""
        is_possible = self.only_launches(target) and plan.num_shards == 1
        return Loads(len(plan.buckets), CudaRecording if is_possible and not verifier.unreadable else None)


@dataclass(frozen=True)
class SyncReport:
    """What one sync cost on one rank."""

    bytes_received: int = 0
    """From other processes, padding included."""
    bytes_missing: int = 0
    """The fewest that this rank could have received: what its engine reads and its trainer does not hold."""
    buffer_bytes: int = 0
    """Kept from sync to sync for what travels."""
    unreadable: tuple[str, ...] = ()
    """Tensors that the engine of some rank keeps in a form that cannot be compared bit by bit."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of `gather`, `transfer`, `load`, `reset` and `checksum`, where they occur; on CUDA, how much later each lets the device
    finish."""


class ColocatedSync:
    """Trainer and engine in the same process on every rank of one pool."""

    def __init__(self, settings: SyncSettings, group: dist.ProcessGroup | None, tensors: NamedTensors, target: Engine):
        """Agrees on the plan with the other ranks, and makes the buffers. Every rank of the group does this."""
        self.settings, self.group, self.shard, num_shards = settings, group, 0, 1
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        parts = [_part_read(target, shapes, settings)]
        if group is not None and any(isinstance(tensor, DTensor) for _, tensor in tensors):
            self.shard, num_shards = group.rank(), group.size()
            parts *= num_shards
            dist.all_gather_object(parts, parts[0], group=group)
        self.plan = plan = settings.plan(shapes, parts, num_shards)
        self.part = plan.part_of[self.shard]
        self.bytes_missing = plan.bytes_missing(self.part, self.shard)
        equal = plan.num_parts == 1
        self.assembler = Assembler(plan, self.part, equal_lengths=equal, device=settings.device)
        others = [part for part in range(plan.num_parts) if part != self.part]
        lengths = [
            [plan.segment(bucket, self.shard, part).num_elements for part in others] for bucket in range(len(plan.buckets))
        ]
        self.outgoing = flat_runs(lengths, turns=2, dtype=plan.dtype, device=settings.device)
        self.buffer_bytes = self.assembler.buffer_bytes + storage_bytes(self.outgoing)
        for bucket, runs in enumerate(self.outgoing):  # of its own part, a rank packs straight into what it receives
            runs.insert(self.part, self.assembler.received[bucket][self.shard])
        self.packer = Packer(plan, self.shard, self.outgoing, takes_checksums=settings.verify)
        self.verifier = Verifier(plan, self.part, target.named_parameters(), device=settings.device, place=settings.place)
        unreadable = [self.verifier.unreadable]
        if group is not None:
            unreadable *= group.size()
            dist.all_gather_object(unreadable, self.verifier.unreadable, group=group)
        self.unreadable = tuple(sorted({name for names in unreadable for name in names}))
        """Weights that some rank's engine cannot show: all ranks must decide alike what follows from it."""
        self.loads = settings.loads(plan, self.verifier, target)

    def sync(self, tensors: NamedTensors, target: Engine) -> SyncReport:
        """Give the engine the trainer's current weights. Every rank of the group calls this.

        Raises:
            WeightMismatchError: what the engine holds afterwards differs from what was trained.
        """
        timeline = Timeline(self.settings.device)
        if self.packer.checksums is not None:
            self.packer.checksums.begin()
            self.verifier.begin()
        named = dict(tensors)
        deliver = Delivery(self.settings, self.assembler, self.verifier, timeline, part="gather")
        if self._is_ready(named.values()):
            target.load_weights(self._as_they_are(named, timeline))
            timeline.mark(self.settings.after_tensors(target))
        else:
            deliver.to(target, self.loads, lambda bucket: self._start(bucket, named, timeline))
        if self.packer.checksums is not None:
            trained = self.packer.checksums.finish()
            if self.plan.num_shards > 1:
                dist.all_reduce(trained, group=self.group)
            self.verifier.compare(trained, target.named_parameters())
            timeline.mark("checksum")
        return SyncReport(
            bytes_received=deliver.bytes_received,
            bytes_missing=self.bytes_missing,
            buffer_bytes=self.buffer_bytes,
            unreadable=self.unreadable,
            seconds=timeline.seconds(),
        )

    def _is_ready(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether the engine can copy straight from the trained tensors: one rank, one dtype, one device."""
        as_loaded = DTYPES[self.settings.dtype], self.settings.device
        return self.plan.num_shards == 1 and all((tensor.dtype, tensor.device) == as_loaded for tensor in tensors)

    def _as_they_are(self, tensors: Mapping[str, torch.Tensor], timeline: Timeline) -> Iterator[tuple[str, torch.Tensor]]:
        for entry in self.plan.entries:
            whole, _ = self.packer.rows(entry, tensors[entry.name])
            held = whole[entry.boxes[self.part].slices]
            timeline.mark("load")
            if self.packer.checksums is not None:
                self.packer.checksums.add((entry.name, entry.boxes[self.part]), held)
                self.verifier.show(entry.name, held)
                timeline.mark("checksum")
            yield entry.name, self.assembler.as_engine_reads(entry, held)
        timeline.mark("load")

    def _start(self, bucket: int, tensors: Mapping[str, torch.Tensor], timeline: Timeline) -> UnderWay:
        """Pack a bucket and send it on its way."""
        self.packer.pack(bucket, tensors, timeline)
        plan, received = self.assembler.plan, self.assembler.received[bucket]
        if plan.num_shards == 1:
            return UnderWay()
        assert self.group is not None
        if plan.num_parts == 1:
            return gather(received, self.shard, self.group)
        others = [rank for rank in range(plan.num_shards) if rank != self.shard]
        outgoing = {rank: self.outgoing[bucket][plan.part_of[rank]] for rank in others}
        return exchange(
            {rank: segment for rank, segment in outgoing.items() if len(segment)},
            {rank: received[rank] for rank in others if len(received[rank])},
            self.group,
        )


class WeightSender:
    """One trainer rank of a pool whose weights go to another pool. Each rank sends its own rows to all receivers, so
    nothing is gathered on this side and the load is spread over all trainers."""

    def __init__(self, settings: SyncSettings, store: TransferStore, tensors: NamedTensors, *, rank: int, num_ranks: int):
        """Publishes names and shapes, learns what the receivers read, and joins the groups of this rank with them."""
        is_sharded = any(isinstance(tensor, DTensor) for _, tensor in tensors)
        assert is_sharded or num_ranks == 1, "several ranks send, but hold whole tensors"
        self.settings = settings
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
        if rank == 0:
            store.put("weights", json.dumps({"shapes": shapes, "num_shards": num_ranks}))
        plan = settings.plan(shapes, _parts_from(store), num_ranks)
        self.groups = [store.group(f"shard{rank}part{part}", 0, 1 + plan.part_of.count(part)) for part in range(plan.num_parts)]
        """By part: this rank and the receivers that read it."""
        segments = [
            [plan.segment(bucket, rank, part).num_elements for part in range(plan.num_parts)]
            for bucket in range(len(plan.buckets))
        ]
        self.outgoing = flat_runs(segments, turns=2, dtype=plan.dtype, device=settings.device)
        self.packer = Packer(plan, rank, self.outgoing, takes_checksums=settings.verify)

    def send(self, tensors: NamedTensors) -> SyncReport:
        """Send the current weights. Every rank of the pool calls this while every receiver receives."""
        packer = self.packer
        if packer.checksums is not None:
            packer.checksums.begin()
        timeline = Timeline(self.settings.device)
        named = dict(tensors)
        under_way: list[UnderWay] = []
        for bucket, segments in enumerate(self.outgoing):
            if len(under_way) == 2:
                under_way.pop(0).wait()  # its buffer is packed again now
                timeline.mark("transfer")
            packer.pack(bucket, named, timeline)
            pairs = zip(segments, self.groups, strict=True)
            under_way.append(UnderWay([group.broadcast(segment, 0) for segment, group in pairs if len(segment)]))
        for messages in under_way:
            messages.wait()
        timeline.mark("transfer")
        if packer.checksums is not None:
            trained = packer.checksums.finish()
            for group in self.groups:
                group.broadcast(trained, 0).wait()
            timeline.mark("checksum")
        return SyncReport(buffer_bytes=storage_bytes(self.outgoing), seconds=timeline.seconds())


class WeightReceiver:
    """One rank of a pool that generates with weights that another pool trains."""

    def __init__(self, settings: SyncSettings, store: TransferStore, target: Engine, *, rank: int, num_ranks: int):
        """Learns names and shapes, says what the engine reads of them, and joins a group with each sender."""
        self.settings = settings
        if rank == 0:
            store.put("num_receivers", str(num_ranks))
        weights = json.loads(store.get("weights"))
        shapes = [(name, tuple(shape)) for name, shape in weights["shapes"]]
        own = _part_read(target, shapes, settings)
        boxes = {name: [box.start, box.stop] for name, box in own.items()}
        store.put(f"part_of_receiver{rank}", json.dumps(boxes))
        self.plan = plan = settings.plan(shapes, _parts_from(store), weights["num_shards"])
        part = plan.part_of[rank]
        self.bytes_missing = plan.bytes_missing(part, None)
        alike = [other for other, its_part in enumerate(plan.part_of) if its_part == part]
        self.groups = [
            store.group(f"shard{shard}part{part}", 1 + alike.index(rank), 1 + len(alike)) for shard in range(plan.num_shards)
        ]
        """By shard: the trainer rank and the receivers that read what this one reads."""
        self.assembler = Assembler(plan, part, equal_lengths=False, device=settings.device)
        self.verifier = Verifier(plan, part, target.named_parameters(), device=settings.device, place=settings.place)
        self.loads = Loads(len(plan.buckets), None)

    def receive(self, target: Engine) -> SyncReport:
        """Give the engine what the senders send.

        Raises:
            WeightMismatchError: what the engine holds afterwards differs from what was trained.
        """
        if self.settings.verify:
            self.verifier.begin()
        timeline = Timeline(self.settings.device)
        deliver = Delivery(self.settings, self.assembler, self.verifier, timeline, part="transfer")
        deliver.to(target, self.loads, lambda bucket: receive(self.assembler.received[bucket], self.groups))
        if self.settings.verify:
            trained = torch.zeros(len(self.groups), len(self.plan.boxes), dtype=torch.int64, device=self.settings.device)
            for work in [group.broadcast(trained[shard], 0) for shard, group in enumerate(self.groups)]:
                work.wait()
            self.verifier.compare(trained.sum(0), target.named_parameters())
            timeline.mark("checksum")
        return SyncReport(
            bytes_received=deliver.bytes_received,
            bytes_missing=self.bytes_missing,
            buffer_bytes=self.assembler.buffer_bytes,
            unreadable=self.verifier.unreadable,
            seconds=timeline.seconds(),
        )


class Delivery:
    """Hands the tensors of arriving buckets out, one bucket ahead on the wire."""

    def __init__(self, settings: SyncSettings, assembler: Assembler, verifier: Verifier, timeline: Timeline, *, part: str):
        """Of the timeline, waiting for buckets is `part`."""
        self.settings, self.assembler, self.timeline, self.part = settings, assembler, timeline, part
        self.verifier = verifier if settings.verify else None
        self.bytes_received = 0

    def to(self, target: Engine, loads: Loads, start: Callable[[int], UnderWay]) -> None:
        """Start each bucket, wait for it, and load it."""
        if loads.are_recorded(target):
            for bucket, _ in self._arrived(start):
                loads.recordings[bucket].replay()
                self.timeline.mark("load")
            target.reset_prefix_cache()
            self.timeline.mark("reset")
        else:
            loads.run(target, self._tensors(loads, start))
            self.timeline.mark(self.settings.after_tensors(target))

    def _tensors(self, loads: Loads, start: Callable[[int], UnderWay]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors in the order of the plan, as the engine reads them; each is valid until the next one is asked for."""
        for _, held in self._arrived(start):
            loads.begin()
            for entry, tensor in held:
                if self.verifier is not None and self.verifier.show(entry.name, tensor):
                    self.timeline.mark("checksum")
                yield entry.name, self.assembler.as_engine_reads(entry, tensor)
            loads.end()
            self.timeline.mark("load")

    def _arrived(self, start: Callable[[int], UnderWay]) -> Iterator[tuple[int, list[tuple[Entry, torch.Tensor]]]]:
        """Each bucket with its tensors, the next one on its way."""
        last = len(self.assembler.received) - 1
        arriving = start(0)
        for bucket in range(last + 1):
            following = start(bucket + 1) if bucket < last else UnderWay()
            arriving.wait()
            self.bytes_received += arriving.bytes_received
            held = self.assembler.assemble(bucket)
            self.timeline.mark(self.part)
            yield bucket, held
            arriving = following


def _part_read(target: Engine, shapes: Shapes, settings: SyncSettings) -> Part:
    """What the engine of this rank reads of the tensors that it does not read whole."""
    if not settings.place.is_sharded:
        return {}
    return dry_run_load(target.load_weights, shapes, dtype=DTYPES[settings.dtype], device=settings.device)


def _parts_from(store: TransferStore) -> list[Part]:
    """What each receiver reads, once all have said so."""
    read = [json.loads(store.get(f"part_of_receiver{rank}")) for rank in range(int(store.get("num_receivers")))]
    return [
        {name: Box(tuple(start), tuple(stop)) for name, (start, stop) in cast(dict[str, list[list[int]]], part).items()}
        for part in read
    ]
