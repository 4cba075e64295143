"""The plan's weight sync buffers against those that a sync makes, for models of real size. No buffer is written to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.shapes import SHAPES
from hybridflow.config.schema import Config, ModelConfig, PlacementConfig, RolloutConfig
from hybridflow.parallel.layout import Layout
from hybridflow.planner.memory import GIB, Gpu
from hybridflow.planner.needs import PoolInfo, pool_needs
from hybridflow.planner.sizes import ModelSize
from hybridflow.resharding.buckets import Part, Plan, plan_buckets
from hybridflow.resharding.layout import Box
from hybridflow.resharding.pack import Assembler, flat_runs, storage_bytes

CPU = torch.device("cpu")
Shapes = Sequence[tuple[str, tuple[int, ...]]]
BY_COLUMNS = ("o_proj.weight", "down_proj.weight")


@cache
def weights_of(name: str) -> Shapes:
    """Names and shapes of a model of the Qwen2.5 family, tied ones once."""
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config())  # type: ignore[no-untyped-call]
    return [(key, tuple(weight.shape)) for key, weight in model.named_parameters()]


def part_of(shapes: Shapes, tensor_rank: int, tensor: int) -> Part:
    """What a tensor rank reads, as vLLM cuts Qwen2: norms whole, two matrices by columns, all else by rows."""
    part = {}
    for name, shape in shapes:
        dim = 1 if name.endswith(BY_COLUMNS) else 0
        if tensor > 1 and "norm" not in name:
            start, stop = [0] * len(shape), list(shape)
            start[dim], stop[dim] = (shape[dim] * rank // tensor for rank in (tensor_rank, tensor_rank + 1))
            part[name] = Box(tuple(start), tuple(stop))
    return part


def plan_of(model: str, layout: Layout, num_shards: int) -> Plan:
    shapes = weights_of(model)
    parts = [part_of(shapes, layout.tensor_rank(rank), layout.tensor) for rank in range(layout.num_ranks)]
    return plan_buckets(shapes, parts, num_shards=num_shards, dtype="bfloat16", bucket_bytes=512 * 2**20)


def arriving(plan: Plan, part: int, *, is_colocated: bool) -> int:
    equal = is_colocated and plan.num_parts == 1
    return Assembler(plan, part, equal_lengths=equal, device=CPU).buffer_bytes


def leaving(plan: Plan, shard: int, parts: Sequence[int]) -> int:
    lengths = [[plan.segment(bucket, shard, part).num_elements for part in parts] for bucket in range(len(plan.buckets))]
    return storage_bytes(flat_runs(lengths, turns=2, dtype=plan.dtype, device=CPU)) if parts else 0


def planned(model: str, roles: tuple[str, ...], ranks: int, *, tensor: int, trainers: int) -> int:
    """What the plan counts on a rank of the pool of `roles`."""
    shape = SHAPES[model]
    size = ModelSize(
        parameters=sum(math.prod(shape) for _, shape in weights_of(model)),
        trained_parameters=1,
        output_parameters=0,
        layer_parameters=1,
        layers_parameters=1,
        num_layers=shape.layers,
        hidden=shape.hidden,
        attention=shape.hidden,
        key_value=shape.hidden,
        feed_forward=shape.intermediate,
        vocabulary=shape.vocabulary,
    )
    config = Config(
        model=ModelConfig(path=model),
        rollout=RolloutConfig(engine="vllm", tensor_parallel=tensor),
        placement=PlacementConfig(pools={"main": f"1x{trainers}", "gen": "1x1"}, roles={}),
    )
    gpu = Gpu(total=140 * GIB, free=139 * GIB)
    pool = PoolInfo(name="main", roles=roles, num_ranks=ranks, gpu=gpu, sizes=dict.fromkeys(roles, size))
    return pool_needs(config, pool, {"actor", "rollout"}).sync_buffers


MODELS = pytest.mark.parametrize("model", ["0.5b", "7b"])
SPARE = 1.55
"""Planned over made, at most; seen 1.50, with 2 ranks that are one engine. Counted and not made: what a rank packs for itself,
and a copy of a tensor that has a bucket of its own, which arrives as it is."""


def assert_near(planned_bytes: int, made: int) -> None:
    assert made <= planned_bytes * 1.001, f"planned {planned_bytes / GIB:.2f}, made {made / GIB:.2f} GiB"  # gaps of alignment
    assert planned_bytes <= made * SPARE, f"planned {planned_bytes / GIB:.2f}, made {made / GIB:.2f} GiB"


@MODELS
@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2), (8, 2), (4, 4)])
def test_buffers_of_a_shared_pool_are_those_that_were_planned(model: str, ranks: int, tensor: int) -> None:
    layout = Layout(data=ranks // tensor, tensor=tensor, tensor_stride=ranks // tensor)
    plan = plan_of(model, layout, ranks)
    made = 0
    for rank in range(ranks):
        others = [part for part in range(plan.num_parts) if part != plan.part_of[rank]]
        made = max(made, arriving(plan, plan.part_of[rank], is_colocated=True) + leaving(plan, rank, others))
    assert_near(planned(model, ("actor", "rollout"), ranks, tensor=tensor, trainers=ranks), made)


@MODELS
@pytest.mark.parametrize(("trainers", "ranks", "tensor"), [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 2, 2), (4, 2, 2)])
def test_buffers_of_separate_pools_are_those_that_were_planned(model: str, trainers: int, ranks: int, tensor: int) -> None:
    plan = plan_of(model, Layout(data=ranks // tensor, tensor=tensor), trainers)
    received = max(arriving(plan, part, is_colocated=False) for part in range(plan.num_parts))
    sent = max(leaving(plan, shard, range(plan.num_parts)) for shard in range(trainers))
    assert_near(planned(model, ("rollout",), ranks, tensor=tensor, trainers=trainers), received)
    assert_near(planned(model, ("actor",), trainers, tensor=tensor, trainers=trainers), sent)
