"""Flat buckets: which tensors travel together, which blocks of them to whom, and where these stand in the buffers."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from hybridflow.resharding.buckets import ALIGNMENT_BYTES, Part, Plan, plan_buckets
from hybridflow.resharding.layout import Box
from hybridflow.resharding.pack import Assembler, Packer, flat_runs
from hybridflow.resharding.timeline import Timeline
from tests.reference.reshard_schedule import schedule
from tests.reference.weight_layouts import FsdpLayout, TensorSpec, chunk_box

CPU = torch.device("cpu")
WHOLE: Part = {}


def test_tensors_keep_their_order_and_fill_buckets_up_to_the_size():
    # bfloat16, one shard, 64 bytes = 32 elements: 16 + 16, then 24, then 8 + 8.
    shapes = [("a", (16,)), ("b", (4, 4)), ("c", (24,)), ("d", (8,)), ("e", (8,))]
    plan = plan_buckets(shapes, [WHOLE], num_shards=1, dtype="bfloat16", bucket_bytes=64)
    assert [[entry.name for entry in bucket] for bucket in plan.buckets] == [["a", "b"], ["c", "d"], ["e"]]


def test_a_tensor_larger_than_a_bucket_gets_its_own():
    shapes = [("small", (8,)), ("large", (1000, 8)), ("last", (8,))]
    plan = plan_buckets(shapes, [WHOLE], num_shards=2, dtype="float32", bucket_bytes=256)
    assert [[entry.name for entry in bucket] for bucket in plan.buckets] == [["small"], ["large"], ["last"]]


def test_ranks_that_read_half_of_each_tensor_get_twice_as_many_to_a_bucket():
    shapes = [(name, (8, 8)) for name in "abcd"]  # 256 bytes each in float32
    halves: list[Part] = [{name: Box((low, 0), (low + 4, 8)) for name, _ in shapes} for low in (0, 4)]
    plan = plan_buckets(shapes, halves, num_shards=2, dtype="float32", bucket_bytes=256)
    assert [[entry.name for entry in bucket] for bucket in plan.buckets] == [["a", "b"], ["c", "d"]]


def random_case(draw: random.Random) -> tuple[dict[str, torch.Tensor], list[Part], int]:
    """Tensors of any shape, some cut along a dim over tensor ranks as engines do it, and a number of shards."""
    num_tensor_ranks = draw.choice([1, 2, 3])
    tensors = {f"t{i}": torch.randn(tuple(draw.randint(1, 9) for _ in range(draw.randint(0, 3)))) for i in range(8)}
    parts: list[dict[str, Box]] = [{} for _ in range(num_tensor_ranks)]
    for name, tensor in tensors.items():
        dims = [dim for dim, size in enumerate(tensor.shape) if size >= num_tensor_ranks > 1]
        if dims and draw.random() < 0.7:
            dim = draw.choice(dims)
            for index, part in enumerate(parts):
                box = chunk_box(Box.whole(tuple(tensor.shape)), dim, num_tensor_ranks, index)
                part[name] = box
    num_shards = draw.randint(1, 5)
    return tensors, [parts[rank % num_tensor_ranks] for rank in range(num_shards)], num_shards


def packer_of(plan: Plan, shard: int) -> tuple[Packer, list[list[torch.Tensor]]]:
    lengths = [
        [plan.segment(bucket, shard, part).num_elements for part in range(plan.num_parts)]
        for bucket in range(len(plan.buckets))
    ]
    # As many turns as buckets, so that all stay readable.
    runs = flat_runs(lengths, turns=len(plan.buckets), dtype=plan.dtype, device=CPU)
    return Packer(plan, shard, runs, takes_checksums=False), runs


@pytest.mark.parametrize("seed", range(30))
def test_what_shards_pack_for_a_part_is_put_together_to_what_its_engine_reads(seed: int):
    tensors, parts, num_shards = random_case(random.Random(seed))
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    plan = plan_buckets(shapes, parts, num_shards=num_shards, dtype="float32", bucket_bytes=512)
    packed = [packer_of(plan, shard) for shard in range(num_shards)]
    for packer, _ in packed:
        for bucket in range(len(plan.buckets)):
            packer.pack(bucket, tensors, Timeline(CPU))
    for part in range(plan.num_parts):
        assembler = Assembler(plan, part, equal_lengths=False, device=CPU)
        for bucket in range(len(plan.buckets)):
            for shard, (_, runs) in enumerate(packed):
                assembler.received[bucket][shard].copy_(runs[bucket][part])
            for entry, held in assembler.assemble(bucket):
                assert torch.equal(held, tensors[entry.name][entry.boxes[part].slices]), entry.name


@pytest.mark.parametrize("seed", range(30))
def test_segments_are_the_sends_of_the_schedule(seed: int):
    # Every rank trains a shard and reads a part: what the plan sends to it is what the schedule lists, to the byte.
    tensors, parts, num_shards = random_case(random.Random(seed))
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items() if tensor.dim()]
    plan = plan_buckets(shapes, parts, num_shards=num_shards, dtype="bfloat16", bucket_bytes=512)
    specs = [TensorSpec(name, shape, itemsize=2) for name, shape in shapes]
    shortest = schedule(FsdpLayout(num_ranks=num_shards), ReadLayout(parts), specs)
    for rank in range(num_shards):
        blocks = [
            block
            for bucket in range(len(plan.buckets))
            for shard in range(num_shards)
            if shard != rank
            for block in plan.segment(bucket, shard, plan.part_of[rank]).blocks
        ]
        assert sum(block.box.num_elements * 2 for block in blocks) == shortest.bytes_received(rank)
        assert plan.bytes_missing(plan.part_of[rank], rank) == shortest.bytes_received(rank)


class ReadLayout:
    """What each engine rank reads, as a layout."""

    def __init__(self, parts: list[Part]):
        self.parts = parts

    @property
    def ranks(self) -> range:
        return range(len(self.parts))

    def box(self, tensor: TensorSpec, rank: int) -> Box | None:
        return self.parts[rank].get(tensor.name, Box.whole(tensor.shape))

    def replica(self, rank: int) -> int:
        return rank


def test_blocks_start_at_multiples_of_the_alignment_and_do_not_overlap():
    draw = random.Random(3)
    for _ in range(30):
        tensors, parts, num_shards = random_case(draw)
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        plan = plan_buckets(shapes, parts, num_shards=num_shards, dtype="bfloat16", bucket_bytes=4096)
        segment = plan.segment(0, 0, plan.num_parts - 1)
        assert all(block.offset * 2 % ALIGNMENT_BYTES == 0 for block in segment.blocks)
        assert all(one.offset + one.box.num_elements <= two.offset for one, two in pairwise(segment.blocks))


def test_no_bucket_of_several_tensors_exceeds_the_size():
    draw = random.Random(4)
    for _ in range(30):
        tensors, parts, num_shards = random_case(draw)
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        plan = plan_buckets(shapes, parts, num_shards=num_shards, dtype="float32", bucket_bytes=1024)
        for bucket, entries in enumerate(plan.buckets):
            for part in range(plan.num_parts):
                received = sum(plan.segment(bucket, shard, part).num_elements * 4 for shard in range(num_shards))
                assert len(entries) == 1 or received <= 1024


def test_the_only_tensor_of_a_bucket_is_read_without_a_copy():
    plan = plan_buckets([("large", (8, 16))], [WHOLE] * 4, num_shards=4, dtype="float32", bucket_bytes=64)
    assembler = Assembler(plan, 0, equal_lengths=True, device=CPU)
    ((_, held),) = assembler.assemble(0)
    assert held.data_ptr() == assembler.received[0][0].data_ptr()


def test_a_box_that_several_parts_read_has_one_number():
    halves: list[Part] = [{"q": Box((low, 0), (low + 2, 4))} for low in (0, 2)]
    plan = plan_buckets([("q", (4, 4)), ("norm", (4,))], halves, num_shards=2, dtype="float32", bucket_bytes=1024)
    assert list(plan.boxes) == [("q", Box((0, 0), (2, 4))), ("q", Box((2, 0), (4, 4))), ("norm", Box((0,), (4,)))]
