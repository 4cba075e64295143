"""Flat buckets: which tensors travel together, and where in the buffer they stand."""

from __future__ import annotations

import random

import torch

from hybridflow.resharding.buckets import Plan, plan_buckets
from hybridflow.resharding.links import Arriving


def test_tensors_keep_their_order_and_fill_buckets_up_to_the_size():
    # bfloat16, one shard, 64 bytes = 32 elements: 16 + 16, then 24, then 8 + 8.
    plan = plan_buckets(
        [("a", (16,)), ("b", (4, 4)), ("c", (24,)), ("d", (8,)), ("e", (8,))], num_shards=1, dtype="bfloat16", bucket_bytes=64
    )
    assert [[slot.name for slot in bucket.slots] for bucket in plan.buckets] == [["a", "b"], ["c", "d"], ["e"]]
    assert [bucket.num_elements * 2 for bucket in plan.buckets] == [64, 64, 16]


def test_a_tensor_larger_than_a_bucket_gets_its_own():
    plan = plan_buckets(
        [("small", (8,)), ("large", (1000, 8)), ("last", (8,))], num_shards=2, dtype="float32", bucket_bytes=256
    )
    assert [[slot.name for slot in bucket.slots] for bucket in plan.buckets] == [["small"], ["large"], ["last"]]


def test_no_bucket_of_several_tensors_exceeds_the_size():
    draw = random.Random(3)
    for _ in range(50):
        shapes = [(f"t{i}", tuple(draw.randint(1, 40) for _ in range(draw.randint(1, 3)))) for i in range(20)]
        num_shards = draw.randint(1, 5)
        plan = plan_buckets(shapes, num_shards=num_shards, dtype="bfloat16", bucket_bytes=4096)
        assert [slot.name for slot in plan.slots] == [name for name, _ in shapes]
        assert all(len(bucket.slots) == 1 or bucket.num_elements * 2 <= 4096 for bucket in plan.buckets)


def test_shards_laid_side_by_side_give_the_tensors_back():
    # The slow version of an all-gather: every shard of torch.chunk copied to its slot, then each tensor read as one view.
    draw = random.Random(5)
    for _ in range(30):
        num_shards = draw.randint(1, 5)
        tensors = {f"t{i}": torch.randn(tuple(draw.randint(1, 9) for _ in range(draw.randint(0, 3)))) for i in range(8)}
        shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
        plan = plan_buckets(shapes, num_shards=num_shards, dtype="float32", bucket_bytes=512)
        for bucket in plan.buckets:
            flat = torch.full((num_shards, bucket.shard_elements), torch.nan)
            for slot in bucket.slots:
                parts = tensors[slot.name].reshape(slot.num_rows, -1).chunk(num_shards)
                for shard, part in enumerate(parts):
                    flat[shard, slot.offset : slot.offset + part.numel()] = part.flatten()
            for slot in bucket.slots:
                assert torch.equal(Arriving(flat).tensor(slot), tensors[slot.name])


def test_the_only_tensor_of_a_bucket_is_read_without_a_copy():
    plan = plan_buckets([("large", (8, 16))], num_shards=4, dtype="float32", bucket_bytes=64)
    flat = torch.arange(128.0).view(4, 32)
    assert Arriving(flat).tensor(plan.slots[0]).data_ptr() == flat.data_ptr()


def test_a_plan_survives_the_way_to_the_other_pool():
    plan = plan_buckets([("a", (7, 3)), ("b", ()), ("c", (100,))], num_shards=3, dtype="bfloat16", bucket_bytes=64)
    assert Plan.from_json(plan.to_json()) == plan
