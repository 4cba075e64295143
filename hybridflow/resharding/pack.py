"""Between tensors and flat segments: a trainer rank packs what it sends, an engine rank puts together what it received.

All views are made once: the buffers stay, and a sync moves hundreds of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import split_with_sizes
from torch.distributed.tensor import DTensor, Shard

from hybridflow.resharding.buckets import Entry, Plan, Segment
from hybridflow.resharding.checksum import Checksums
from hybridflow.resharding.layout import Box, shard_box
from hybridflow.resharding.partial_tensor import PartialTensor
from hybridflow.resharding.recorded import Replay
from hybridflow.resharding.timeline import Timeline
from hybridflow.resharding.verify import DTYPES

NamedTensors = Sequence[tuple[str, torch.Tensor]]


def flat_runs(lengths: Sequence[Sequence[int]], *, turns: int, dtype: str, device: torch.device) -> list[list[torch.Tensor]]:
    """For each bucket neighbouring runs of so many elements; buckets take turns in as many buffers as there are turns."""
    sizes = [sum(runs) for runs in lengths]
    buffers = [torch.empty(max(sizes[turn::turns], default=0), dtype=DTYPES[dtype], device=device) for turn in range(turns)]
    return [list(split_with_sizes(buffers[bucket % turns][: sum(runs)], runs)) for bucket, runs in enumerate(lengths)]


def storage_bytes(runs: Sequence[Sequence[torch.Tensor]]) -> int:
    """Bytes of the buffers behind runs."""
    storages = {run.untyped_storage().data_ptr(): run.untyped_storage().nbytes() for bucket in runs for run in bucket}
    return sum(storages.values())


class Packer:
    """One trainer rank's rows of every tensor, as they leave it."""

    def __init__(self, plan: Plan, shard: int, targets: Sequence[Sequence[torch.Tensor]], *, takes_checksums: bool):
        """`targets` has, for each bucket and part, memory for the segment, which may be longer."""
        self.plan, self.shard = plan, shard
        shapes = [(key, key[1].shape) for key in plan.boxes]
        device = targets[0][0].device
        self.checksums = Checksums(shapes, dtype=DTYPES[plan.dtype], device=device) if takes_checksums else None
        self._targets = targets
        self._blocks: list[list[tuple[Entry, Box, torch.Tensor]]] = []
        """By bucket: the blocks that leave, and where they are packed."""
        self._shown: list[list[tuple[tuple[str, Box], torch.Tensor, int]]] = []
        """By bucket: what checksums are taken of; a box that several parts read counts once."""
        for bucket, runs in enumerate(targets):
            blocks, shown = [], {}
            for part, run in enumerate(runs):
                segment = plan.segment(bucket, shard, part)
                for block, view in zip(segment.blocks, segment_views(segment, run), strict=True):
                    box = block.entry.boxes[part]
                    blocks.append((block.entry, block.box, view))
                    shown[block.entry.name, box] = view, block.box.within(box).start[0] if box.start else 0
            self._blocks.append(blocks)
            self._shown.append([(key, view, first_row) for key, (view, first_row) in shown.items()])
        self._rows: dict[str, Box] = {}
        """By name: which box of a tensor this rank holds."""
        self._replays = [Replay() for _ in targets]

    @torch.no_grad()
    def pack(self, bucket: int, tensors: Mapping[str, torch.Tensor], timeline: Timeline) -> None:
        """Cast this rank's blocks of a bucket into their places."""
        rows = {entry.name: self.rows(entry, tensors[entry.name]) for entry in self.plan.buckets[bucket]}
        sources = [_view(*rows[entry.name], box) for entry, box, _ in self._blocks[bucket]]
        views = [view for _, _, view in self._blocks[bucket]]
        if views:
            self._replays[bucket].run(lambda: torch._foreach_copy_(views, sources), [*self._targets[bucket], *sources])
        timeline.mark("gather")
        if self.checksums is not None:
            self.checksums.add_all(self._shown[bucket])
            timeline.mark("checksum")

    @torch.no_grad()  # in which DTensor.to_local does not go through autograd, ten times slower
    def rows(self, entry: Entry, tensor: torch.Tensor) -> tuple[torch.Tensor, Box]:
        """The memory of a tensor in this process, and which box of the tensor it is."""
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        if entry.name not in self._rows:
            self._rows[entry.name] = self._box_of_rows(entry, tensor, local)
        return local, self._rows[entry.name]

    def _box_of_rows(self, entry: Entry, tensor: torch.Tensor, local: torch.Tensor) -> Box:
        if not isinstance(tensor, DTensor):
            return Box.whole(entry.shape)
        assert all(placement == Shard(0) for placement in tensor.placements), f"{entry.name} is sharded as {tensor.placements}"
        box = shard_box(entry.shape, self.plan.num_shards, self.shard) or Box.whole(entry.shape).between(0, 0, 0)
        assert tuple(local.shape) == box.shape, f"{entry.name}: shard {self.shard} is {tuple(local.shape)}, not {box.shape}"
        return box


class Assembler:
    """One engine rank's part of every tensor, as it arrives."""

    def __init__(self, plan: Plan, part: int, *, equal_lengths: bool, device: torch.device):
        """`equal_lengths` pads the segments of a bucket to one length, as an all-gather needs."""
        self.plan, self.part = plan, part
        shards = range(plan.num_shards)
        segments = [[plan.segment(bucket, shard, part) for shard in shards] for bucket in range(len(plan.buckets))]
        lengths = [[segment.num_elements for segment in arriving] for arriving in segments]
        if equal_lengths:
            lengths = [[max(runs)] * len(runs) for runs in lengths]
        self.received = flat_runs(lengths, turns=2, dtype=plan.dtype, device=device)
        """By bucket: where each shard's segment goes."""
        wholes = [plan.assembled(bucket, part) for bucket in range(len(plan.buckets))]
        in_order = [  # segments side by side are the tensors as they are: one shard, or one tensor without gaps
            plan.num_shards == 1 or (len(whole.blocks) == 1 and whole.blocks[0].box.num_elements == sum(runs))
            for whole, runs in zip(wholes, lengths, strict=True)
        ]
        sizes = [[0 if stays else whole.num_elements] for whole, stays in zip(wholes, in_order, strict=True)]
        assembled = flat_runs(sizes, turns=1, dtype=plan.dtype, device=device)
        self.buffer_bytes = storage_bytes(self.received) + storage_bytes(assembled)
        self._held: list[list[tuple[Entry, torch.Tensor]]] = []
        self._copies: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        """By bucket: targets and sources."""
        for bucket, whole in enumerate(wholes):
            runs = self.received[bucket]
            flat = runs[0].as_strided((sum(lengths[bucket]),), (1,)) if in_order[bucket] else assembled[bucket][0]
            self._held.append(list(zip(plan.buckets[bucket], segment_views(whole, flat), strict=True)))
            self._copies.append(([], []) if in_order[bucket] else self._pairs(bucket, segments[bucket]))
        self._replays = [Replay() for _ in wholes]

    def _pairs(self, bucket: int, segments: Sequence[Segment]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        held = dict(self._held[bucket])
        targets, sources = [], []
        for segment, run in zip(segments, self.received[bucket], strict=True):
            sources += segment_views(segment, run)
            targets += [_view(held[block.entry], block.entry.boxes[self.part], block.box) for block in segment.blocks]
        return targets, sources

    @torch.no_grad()
    def assemble(self, bucket: int) -> list[tuple[Entry, torch.Tensor]]:
        """The part of every tensor of a bucket whose segments have come; valid until the next bucket is assembled."""
        targets, sources = self._copies[bucket]
        if targets:
            self._replays[bucket].run(lambda: torch._foreach_copy_(targets, sources), [*targets[:1], *self.received[bucket]])
        return self._held[bucket]

    def as_engine_reads(self, entry: Entry, held: torch.Tensor) -> torch.Tensor:
        """A tensor of full shape, of which the engine reads what `held` is."""
        box = entry.boxes[self.part]
        return held if box == Box.whole(entry.shape) else PartialTensor(held, entry.shape, box, weight=entry.name, reads=[])


def segment_views(segment: Segment, run: torch.Tensor) -> list[torch.Tensor]:
    """The blocks of a segment in its memory."""
    return [run[block.offset : block.offset + block.box.num_elements].view(block.box.shape) for block in segment.blocks]


def _view(tensor: torch.Tensor, whole: Box, block: Box) -> torch.Tensor:
    """The view of `block` in a tensor that is `whole`; both count from the same corner."""
    return tensor if block == whole else tensor[block.within(whole).slices]
