"""A run that is killed and started again ends exactly where it would have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ray.pausing_workers import MARKER
from tests.ray.runs import Toy, metrics_of, repeatable, state_digests, trained

NUM_STEPS = 9
TRAINING = (
    f"run.total_steps={NUM_STEPS}",
    "algorithm.prompts_per_update=2",
    "algorithm.kl_controller=adaptive",
    "actor.schedule=cosine",
    "checkpoint.save_last=true",
)
LAST = f"checkpoints/step_{NUM_STEPS:06d}"
RUN_ID = "HYBRIDFLOW_TEST_RUN"
"""Marks the environment, and with it every process, of a run that will be killed."""
SOON = {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"}
"""Two idle agents of Ray's own look for the rest of a killed cluster for a minute before they end. Here they need not."""


@pytest.fixture(scope="module")
def uninterrupted(toy: Toy, cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of nine steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trained(toy, folder, *TRAINING, "checkpoint.every_steps=3")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pausing", "every_steps", "resumes_after"),
    [("reward=PausesInCollect", 3, 6), ("actor=PausesInLearn", 3, 6), ("critic=PausesInSave", 1, 6)],
)
def test_a_killed_run_that_is_started_again_ends_with_the_same_weights_and_metrics(
    toy: Toy, uninterrupted: Path, tmp_path: Path, pausing: str, every_steps: int, resumes_after: int
) -> None:
    role, _, worker = pausing.partition("=")
    worker_name = f"placement.workers.{role}=tests.ray.pausing_workers:{worker}"
    overrides = [*TRAINING, f"checkpoint.every_steps={every_steps}", worker_name]

    kill_where_it_pauses(toy, tmp_path, overrides)
    checkpoints = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert (".step_000007.tmp" in checkpoints) == (worker == "PausesInSave")
    assert checkpoints[-1] == f"step_{resumes_after:06d}"
    trained(toy, tmp_path, *overrides)

    assert state_digests(tmp_path / LAST) == state_digests(uninterrupted / LAST)
    assert repeatable(metrics_of(tmp_path)) == repeatable(metrics_of(uninterrupted))


def test_the_digest_sees_a_different_training(toy: Toy, uninterrupted: Path, cluster: None, tmp_path: Path) -> None:
    trained(toy, tmp_path, *TRAINING, "run.seed=1", "checkpoint.resume=never")
    ours, theirs = state_digests(tmp_path / LAST), state_digests(uninterrupted / LAST)
    assert ours.keys() == theirs.keys() == {"actor", "critic"}
    assert all(ours[role] != theirs[role] for role in ours)


def kill_where_it_pauses(toy: Toy, folder: Path, overrides: list[str]) -> None:
    """Start the command, SIGKILL the driver where a worker pauses, and wait until nothing of the run is left."""
    run_id = uuid.uuid4().hex
    log = folder / "killed.log"
    with log.open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "hybridflow.train", str(toy.config), f"run.folder={folder}", *overrides],
            env={**os.environ, RUN_ID: run_id, **SOON},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            wait_until((folder / MARKER).exists, lambda: f"the run did not come to its pause:\n{log.read_text()}")
            assert len(processes_of(run_id)) > 5, "Ray's processes and those of the ranks carry the mark"
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    wait_until(lambda: not processes_of(run_id), lambda: f"processes outlived their driver: {processes_of(run_id)}")


def wait_until(condition: Callable[[], bool], problem: Callable[[], str], *, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.05)


def processes_of(run_id: str) -> dict[int, str]:
    """Process id -> command line of every process whose environment has the mark."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{RUN_ID}={run_id}".encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has ended, or is somebody else's
    return found
