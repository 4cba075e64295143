"""Layouts, groups and schedules: invariants over many layouts, and the byte counts of HybridFlow's table 2."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction
from math import prod

import numpy as np
import pytest
import torch

from tests.reference.reshard_schedule import Schedule, schedule
from tests.reference.transition_cost import deepspeed_chat_cost, hybridflow_cost, vanilla_cost
from tests.reference.weight_layouts import (
    FsdpLayout,
    GenerationLayout,
    Grouping,
    TensorSpec,
    TrainingLayout,
    WeightLayout,
    chunk,
)

PAPER = GenerationLayout(training=TrainingLayout(pipeline=1, tensor=4, data=2, first_rank=1), tensor=2)
"""Section 5.3: training 1-4-2, generation 1-2-2-2, GPUs 1 to 8."""


def model(num_layers: int, size: int = 48) -> list[TensorSpec]:
    """Every layer has one matrix cut along rows and one cut along columns, as attention and MLP have."""
    return [
        TensorSpec(f"layer{layer}.{dim}", (size, size), itemsize=2, tensor_dim=dim, layer=layer)
        for layer in range(num_layers)
        for dim in (0, 1)
    ]


def num_bytes(tensors: list[TensorSpec]) -> int:
    return sum(prod(tensor.shape) * tensor.itemsize for tensor in tensors)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def layouts() -> list[GenerationLayout]:
    """Every way of generating on training layouts of up to 4 stages x 4 tensor ranks x 3 replicas."""
    found = []
    for pipeline, tensor, data in itertools.product((1, 2, 4), (1, 2, 4), (1, 2, 3)):
        training = TrainingLayout(pipeline=pipeline, tensor=tensor, data=data, num_layers=8)
        for stages, parts in itertools.product(divisors(pipeline), divisors(tensor)):
            found.append(GenerationLayout(training=training, tensor=parts, pipeline=stages))
    return found


def held_after(training: WeightLayout, generation: WeightLayout, plan: Schedule, tensor: TensorSpec) -> dict[int, np.ndarray]:
    """How often each element of `tensor` reached each rank of `generation`: what it trained, and what was sent to it."""
    counts = {rank: np.zeros(tensor.shape, int) for rank in generation.ranks}
    for rank in set(generation.ranks) & set(training.ranks):
        if (box := training.box(tensor, rank)) is not None:
            counts[rank][tuple(map(slice, box.start, box.stop))] += 1
    for send in plan.sends:
        if send.tensor == tensor.name:
            counts[send.destination][tuple(map(slice, send.box.start, send.box.stop))] += 1
    return counts


def assert_every_rank_ends_with_its_slice(
    training: WeightLayout, generation: WeightLayout, tensors: list[TensorSpec]
) -> Schedule:
    plan = schedule(training, generation, tensors)
    for tensor in tensors:
        for rank, counts in held_after(training, generation, plan, tensor).items():
            needed = generation.box(tensor, rank)
            if needed is not None:
                inside = counts[tuple(map(slice, needed.start, needed.stop))]
                assert (inside == 1).all(), f"{tensor.name} on rank {rank}: missing, or sent twice"
    for send in plan.sends:
        (tensor,) = [tensor for tensor in tensors if tensor.name == send.tensor]
        held = training.box(tensor, send.source)
        needed = generation.box(tensor, send.destination)
        assert held is not None and held.intersect(send.box) == send.box, "a rank sends what it has not"
        assert needed is not None and needed.intersect(send.box) == send.box, "a rank gets what it does not need"
        assert send.source != send.destination
    return plan


def test_tensor_groups_of_the_papers_example_are_at_interval_two():
    assert PAPER.tensor_groups() == [[1, 3], [2, 4], [5, 7], [6, 8]]


def test_micro_data_groups_of_the_papers_example_are_neighbours():
    assert PAPER.micro_data_groups() == [[1, 2], [3, 4], [5, 6], [7, 8]]


def test_in_the_papers_example_each_rank_needs_one_more_quarter_from_its_neighbour():
    tensors = model(num_layers=1)
    plan = schedule(PAPER.training, PAPER, tensors)
    assert {(send.source, send.destination) for send in plan.sends} == {
        (1, 2), (2, 1), (3, 4), (4, 3), (5, 6), (6, 5), (7, 8), (8, 7),
    }  # fmt: skip
    assert all(plan.bytes_received(rank) == num_bytes(tensors) // 4 for rank in PAPER.ranks)


def test_pipeline_groups_are_at_interval_too():
    # Training stages 0..3 of two ranks each; generation stages are 0 and 1, so stages {0, 1} and {2, 3} go together.
    layout = GenerationLayout(training=TrainingLayout(pipeline=4, tensor=2, num_layers=8), tensor=2, pipeline=2)
    assert layout.micro_data_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_bytes_equal_table_2_and_every_slice_is_complete(layout: GenerationLayout):
    tensors = model(num_layers=8)
    training = layout.training
    plan = assert_every_rank_ends_with_its_slice(training, layout, tensors)
    cost = hybridflow_cost(
        pipeline=training.pipeline,
        tensor=training.tensor,
        generation_pipeline=layout.pipeline,
        generation_tensor=layout.tensor,
    )
    for rank in layout.ranks:
        assert plan.bytes_received(rank) == cost.received * num_bytes(tensors)
        assert plan.bytes_sent(rank) == plan.bytes_received(rank), "sources are unbalanced"
        trained, needed = (
            sum(box.num_elements for tensor in tensors if (box := cut.box(tensor, rank)) is not None)
            for cut in (training, layout)
        )
        inside = sum(
            overlap.num_elements
            for tensor in tensors
            if (held := training.box(tensor, rank)) and (need := layout.box(tensor, rank)) and (overlap := held.intersect(need))
        )
        assert inside == trained, "some of what is trained is no part of what generates: redundant memory"
        assert needed * 2 == cost.peak * num_bytes(tensors)


@pytest.mark.parametrize("grouping", ["interval", "consecutive"])
def test_random_fsdp_shards_reach_any_generation_layout(grouping: Grouping):
    draw = random.Random(7)
    for _ in range(40):
        num_ranks = draw.choice([1, 2, 3, 4, 6, 8])
        shapes = [tuple(draw.randint(1, 13) for _ in range(draw.randint(1, 3))) for _ in range(6)]
        tensors = [
            TensorSpec(f"t{i}", shape, itemsize=2, tensor_dim=draw.choice([None, 0, len(shape) - 1]))
            for i, shape in enumerate(shapes)
        ]
        ranks = TrainingLayout(tensor=num_ranks)
        generation = GenerationLayout(training=ranks, tensor=draw.choice(divisors(num_ranks)), grouping=grouping)
        assert_every_rank_ends_with_its_slice(FsdpLayout(num_ranks=num_ranks), generation, tensors)


def test_engines_that_take_whole_tensors_receive_all_that_they_do_not_train():
    # FSDP over 4 ranks holds a quarter; an engine that cuts for itself is given all of the other three.
    tensors = model(num_layers=2)
    plan = schedule(FsdpLayout(num_ranks=4), GenerationLayout(training=TrainingLayout(tensor=4)), tensors)
    assert [plan.bytes_received(rank) for rank in range(4)] == [num_bytes(tensors) * 3 // 4] * 4


def test_interval_groups_receive_less_than_consecutive_ones():
    # Rows only, 4 ranks, tensor parallel 2. Interval: a rank needs half and trains a quarter inside it. Consecutive: ranks
    # 1 and 2 of 0..3 train a quarter that lies in the half of the other tensor rank, and receive a whole half.
    tensors = [TensorSpec("rows", (16, 4), itemsize=2, tensor_dim=0)]
    training, ranks = FsdpLayout(num_ranks=4), TrainingLayout(tensor=4)
    received = {}
    for grouping in ("interval", "consecutive"):
        plan = schedule(training, GenerationLayout(training=ranks, tensor=2, grouping=grouping), tensors)
        received[grouping] = [Fraction(plan.bytes_received(rank), num_bytes(tensors)) for rank in range(4)]
    quarter, half = Fraction(1, 4), Fraction(1, 2)
    assert received == {"interval": [quarter] * 4, "consecutive": [quarter, half, half, quarter]}


def test_between_pools_every_byte_is_sent_once_and_replicas_share_the_sending():
    tensors = model(num_layers=4)
    training = TrainingLayout(tensor=2, data=2, num_layers=4)
    generation = GenerationLayout(training=TrainingLayout(tensor=2, first_rank=4, num_layers=4), tensor=2)
    plan = assert_every_rank_ends_with_its_slice(training, generation, tensors)
    assert [plan.bytes_received(rank) for rank in generation.ranks] == [num_bytes(tensors) // 2] * 2
    assert [plan.bytes_sent(rank) for rank in training.ranks] == [num_bytes(tensors) // 4] * 4


def test_the_other_systems_of_table_2():
    # 1-8-2 to 1-2: ours (8 - 2) / (2 * 8) = 3/8, vanilla 7/8, DeepSpeed-Chat 15/16 of the model.
    assert hybridflow_cost(pipeline=1, tensor=8, generation_pipeline=1, generation_tensor=2).received == Fraction(3, 8)
    assert vanilla_cost(pipeline=1, tensor=8).received == Fraction(7, 8)
    assert deepspeed_chat_cost(pipeline=1, tensor=8, data=2).received == Fraction(15, 16)


@pytest.mark.parametrize("num_parts", [1, 2, 3, 4, 7])
def test_chunks_are_those_of_torch(num_parts: int):
    for size in range(1, 30):
        expected = [len(part) for part in torch.arange(size).chunk(num_parts)]
        found = [stop - start for start, stop in (chunk(size, num_parts, index) for index in range(num_parts))]
        assert found == expected + [0] * (num_parts - len(expected))
