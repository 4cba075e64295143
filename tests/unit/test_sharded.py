"""A role's state on disk, in one process. Several ranks: tests/distributed/test_sharded_ranks.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hybridflow.checkpoint.sharded import load_sharded, save_sharded
from hybridflow.errors import CheckpointError


def example(fill: float = 0.0) -> dict[str, object]:
    return {
        "model": {"layer.weight": torch.full((300, 10), fill), "layer.bias": torch.full((3,), fill, dtype=torch.bfloat16)},
        "random": {"rank_0": torch.zeros(16, dtype=torch.uint8)},
        "num_updates": int(fill),
        "schedule": {"rates": [fill, 2 * fill]},
    }


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = example(7.0)
    state["random"] = {"rank_0": torch.arange(16, dtype=torch.uint8)}
    save_sharded(str(tmp_path / "actor"), state, None)
    return tmp_path / "actor"


def test_every_value_comes_back_into_the_same_tensors(saved: Path):
    state = example()
    weight = state["model"]["layer.weight"]  # type: ignore[index]
    load_sharded(str(saved), state, None)
    assert torch.equal(weight, torch.full((300, 10), 7.0))
    assert torch.equal(state["random"]["rank_0"], torch.arange(16, dtype=torch.uint8))  # type: ignore[index]
    assert (state["num_updates"], state["schedule"]) == (7, {"rates": [7.0, 14.0]})


def test_a_part_of_the_state_can_be_read_alone(saved: Path):
    state: dict[str, object] = {"model": {"layer.bias": torch.zeros(3, dtype=torch.bfloat16)}}
    load_sharded(str(saved), state, None)
    assert torch.equal(state["model"]["layer.bias"], torch.full((3,), 7.0, dtype=torch.bfloat16))  # type: ignore[index]


def test_a_key_that_was_not_saved_is_named(saved: Path):
    with pytest.raises(CheckpointError, match=r"Missing key .*model\.new"):
        load_sharded(str(saved), {"model": {"new": torch.zeros(1)}}, None)


def test_another_shape_is_named_with_both_shapes(saved: Path):
    with pytest.raises(CheckpointError, match=r"\[300, 10\].*\[4, 10\].*layer\.weight"):
        load_sharded(str(saved), {"model": {"layer.weight": torch.zeros(4, 10)}}, None)


def test_a_truncated_shard_is_an_error(saved: Path):
    shard = next(saved.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="actor could not be read"):
        load_sharded(str(saved), example(), None)


def test_a_missing_shard_is_an_error(saved: Path):
    next(saved.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        load_sharded(str(saved), example(), None)


def test_damaged_metadata_is_an_error(saved: Path):
    (saved / ".metadata").write_bytes((saved / ".metadata").read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"\.metadata could not be read: UnpicklingError"):
        load_sharded(str(saved), example(), None)


def test_a_folder_without_sharded_state_says_what_it_holds(tmp_path: Path):
    (tmp_path / "something_else").touch()
    with pytest.raises(CheckpointError, match="found something_else"):
        load_sharded(str(tmp_path), example(), None)


def test_a_full_disk_is_an_error_that_says_how_much_is_free(small_disk: Path):
    with pytest.raises(CheckpointError, match=r"actor could not be written: .*; [\d,]+ bytes are free there"):
        save_sharded(str(small_disk / "actor"), {"model": {"weight": torch.randn(1000, 1000)}}, None)
