"""A role's state on disk, written by some ranks and read by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hybridflow.checkpoint.sharded import load_sharded, save_sharded
from hybridflow.errors import CheckpointError
from tests.distributed.ranks import start

# Seven rows divide by neither two nor three ranks.
WEIGHT = torch.arange(35, dtype=torch.float32).reshape(7, 5)


def on_ranks(num_ranks: int, function: Callable[[str], None], folder: Path) -> None:
    """Run `function(folder)` in `num_ranks` processes that share a gloo group."""
    meeting_point = folder.parent / f"{function.__name__}_{num_ranks}"
    start(num_ranks, _on_rank, num_ranks, str(meeting_point), function, str(folder))


def _on_rank(rank: int, num_ranks: int, meeting_point: str, function: Callable[[str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=num_ranks)
    function(folder)
    dist.destroy_process_group()


def state_of(weight: torch.Tensor) -> dict[str, object]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    random = {f"rank_{rank}": torch.full((4,), rank, dtype=torch.uint8)}
    return {"model": {"weight": distribute_tensor(weight.clone(), mesh, [Shard(0)])}, "random": random, "updates": 3}


def save(folder: str) -> None:
    save_sharded(folder, state_of(WEIGHT), dist.group.WORLD)


def load_and_compare(folder: str) -> None:
    state = state_of(torch.zeros_like(WEIGHT))
    del state["random"]
    load_sharded(folder, state, dist.group.WORLD)
    weight = state["model"]["weight"]  # type: ignore[index]
    assert isinstance(weight, DTensor)
    assert torch.equal(weight.full_tensor(), WEIGHT)
    assert state["updates"] == 3


def load_own_random_state(folder: str) -> None:
    rank = dist.get_rank()
    state: dict[str, object] = {"random": {f"rank_{rank}": torch.zeros(4, dtype=torch.uint8)}}
    load_sharded(folder, state, dist.group.WORLD)
    assert torch.equal(state["random"][f"rank_{rank}"], torch.full((4,), rank, dtype=torch.uint8))  # type: ignore[index]


def fail_on_every_rank(folder: str) -> None:
    """Rank 1 alone cannot write its file: its name is taken by a folder."""
    if dist.get_rank() == 0:
        (Path(folder) / "__1_0.distcp").mkdir(parents=True)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"IsADirectoryError.*\(rank 1\)"):
        save_sharded(folder, state_of(WEIGHT), dist.group.WORLD)


@pytest.fixture(scope="module")
def written_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written_by_two") / "actor"
    on_ranks(2, save, folder)
    return folder


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_any_number_of_ranks_reads_what_two_ranks_wrote(written_by_two: Path, num_ranks: int):
    on_ranks(num_ranks, load_and_compare, written_by_two)


def test_a_process_without_a_group_reads_what_two_ranks_wrote(written_by_two: Path):
    state: dict[str, object] = {"model": {"weight": torch.zeros_like(WEIGHT)}}
    load_sharded(str(written_by_two), state, None)
    assert torch.equal(state["model"]["weight"], WEIGHT)  # type: ignore[index]


def test_every_rank_gets_its_own_random_state_back(written_by_two: Path):
    on_ranks(2, load_own_random_state, written_by_two)


def test_a_rank_that_cannot_write_fails_all_ranks_and_is_named(tmp_path: Path):
    on_ranks(2, fail_on_every_rank, tmp_path / "actor")
