"""What is evaluated when a checkpoint is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybridflow.checkpoint.sharded import save_sharded
from hybridflow.checkpoint.store import CheckpointStore, RunState
from hybridflow.evaluate import exported, main


def run_of(folder: Path, model: str, weight: float) -> Path:
    """A run with one checkpoint, all weights `weight`."""
    shapes = {name: tensor.shape for name, tensor in load_file(f"{model}/model.safetensors").items()}
    store = CheckpointStore(folder)
    with store.writing(3) as written:
        weights = {name: torch.full(shape, weight) for name, shape in shapes.items()}
        save_sharded(str(written / "actor"), {"model": weights}, None)
        settings = {"model": {"path": model}, "run": {"device": "cpu"}, "environment": {"path": "game.py", "max_turns": 4}}
        store.write_state(written, RunState(step=3, config=settings))
    return folder


def test_runs_of_the_same_name_are_not_taken_for_each_other(tiny_model: str, tmp_path: Path):
    first, second = (run_of(tmp_path / place / "rl", tiny_model, weight) for place, weight in (("a", 1.0), ("b", 2.0)))
    folders = [exported(run, tmp_path / "out", role="actor")[0] for run in (first, second, first)]
    found = [next(iter(load_file(f"{folder}/model.safetensors").values())).flatten()[0].item() for folder in folders]
    assert found == [1.0, 2.0, 1.0]
    assert folders[0] == folders[2]


def test_a_model_that_was_moved_is_asked_for_and_taken(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    gone = tmp_path / "gone"
    gone.symlink_to(tiny_model)
    run = run_of(tmp_path / "rl", str(gone), 1.0)
    gone.unlink()
    assert main([str(run), "--data", "x.parquet", "--output", str(tmp_path / "out")]) == 1
    assert "--source MODEL says where it is" in capsys.readouterr().err
    _, settings = exported(run, tmp_path / "out", role="actor", source=tiny_model)
    assert settings["run"] == {"device": "cpu"}
    assert settings["environment"] == {"path": "game.py", "max_turns": 4}, (
        "what was trained on episodes is evaluated on episodes"
    )
