"""How ranks are numbered along the axes of a layout."""

from __future__ import annotations

import pytest

from hybridflow.config.schema import Config, PlacementConfig, RolloutConfig
from hybridflow.parallel.layout import Layout
from hybridflow.workers.rollout import RolloutWorker


def coordinates(layout: Layout) -> list[tuple[int, int, int]]:
    """(data, sequence, tensor) of every rank."""
    ranks = range(layout.num_ranks)
    return [(layout.data_rank(rank), layout.sequence_rank(rank), layout.tensor_rank(rank)) for rank in ranks]


def test_the_tensor_axis_is_the_fastest_then_sequence_then_data():
    layout = Layout(data=2, sequence=2, tensor=2)
    assert coordinates(layout) == [(d, s, t) for d in (0, 1) for s in (0, 1) for t in (0, 1)]


def test_a_stride_moves_tensor_ranks_apart():
    # Ranks 0 and 2 share the first engine, 1 and 3 the second; then the same on ranks 4 to 7.
    layout = Layout(data=4, tensor=2, tensor_stride=2)
    engines = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1)]
    assert [(data, tensor) for data, _, tensor in coordinates(layout)] == engines
    assert [layout.is_data_leader(rank) for rank in range(8)] == [True, True, False, False] * 2


@pytest.mark.parametrize(
    ("pool", "tensor", "groups"),
    [
        ("1x4", 2, [[0, 2], [1, 3]]),
        ("1x4", 4, [[0, 1, 2, 3]]),
        ("1x4", 1, [[0], [1], [2], [3]]),
        ("2x4", 2, [[0, 2], [1, 3], [4, 6], [5, 7]]),  # an engine stays on its node
        ("2x2", 4, [[0, 1, 2, 3]]),  # unless it is larger
        ("2x3", 2, [[0, 1], [2, 3], [4, 5]]),
    ],
)
def test_engines_take_ranks_at_the_strides_of_the_paper_within_a_node(pool: str, tensor: int, groups: list[list[int]]):
    config = Config(placement=PlacementConfig(pools={"main": pool}), rollout=RolloutConfig(tensor_parallel=tensor))
    layout = RolloutWorker.layout_of(config, sum(map(len, groups)))
    found: dict[int, list[int]] = {}
    for rank in range(layout.num_ranks):
        found.setdefault(layout.data_rank(rank), []).append(rank)
    assert list(found.values()) == groups
