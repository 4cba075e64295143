"""What the command says when a run is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.checkpoint.store import CheckpointStore, RunState
from hybridflow.config.schema import CheckpointConfig, Config, RunConfig
from hybridflow.train import how_to_go_on


@pytest.mark.parametrize(
    ("resume", "has_checkpoint", "expected"),
    [
        ("auto", False, "There is no checkpoint yet: the same command starts anew."),
        ("never", False, "There is no checkpoint yet: the same command starts anew."),
        ("auto", True, "The same command continues after {newest}."),
        ("never", True, "checkpoint.resume=never: add checkpoint.resume=auto to continue after {newest}."),
    ],
)
def test_a_stopped_run_says_what_the_same_command_would_do(
    tmp_path: Path, resume: str, has_checkpoint: bool, expected: str
) -> None:
    store = CheckpointStore(tmp_path)
    if has_checkpoint:
        with store.writing(3) as folder:
            store.write_state(folder, RunState(step=3, config={}, algorithm={}))
    config = Config(run=RunConfig(folder=str(tmp_path)), checkpoint=CheckpointConfig(resume=resume))
    assert how_to_go_on(config) == expected.format(newest=store.latest())
