"""A role's state on disk, in one process. Several ranks: tests/distributed/test_sharded_ranks.py."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from hybridflow.checkpoint.sharded import check_same_parts, load_sharded, save_sharded
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


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_metadata_file_cannot_run_code(tmp_path: Path):
    state = {"model": {"a": torch.ones(3)}}
    save_sharded(str(tmp_path / "actor"), state, None)
    (tmp_path / "actor/.metadata").write_bytes(pickle.dumps(RunsCode(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"\.metadata could not be read: .*refers to posix\.system"):
        load_sharded(str(tmp_path / "actor"), state, None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"a": torch.zeros(3)}, r"1 saved parts have no place in it, the first is model\.b"),
        (
            {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(1)},
            "1 of its parts were not saved, the first is model",
        ),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, r"model\.b was saved as \(2,\) and is \(4,\)"),
        ({"a": torch.zeros(3), "b": 5}, r"model\.b was saved as \(2,\) and is None"),
    ],
)
def test_a_checkpoint_with_more_or_fewer_or_other_parts_than_the_model_is_refused(
    tmp_path: Path, now: dict[str, object], words: str
):
    save_sharded(str(tmp_path), {"model": {"a": torch.ones(3), "b": torch.ones(2)}}, None)
    check_same_parts(str(tmp_path), {"model": {"a": torch.zeros(3), "b": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=words):
        check_same_parts(str(tmp_path), {"model": now})
