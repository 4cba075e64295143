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
from tests.ray.runs import Toy, differences, metrics_of, state_digests, trained

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
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Two idle processes of Ray's own that look for the rest of a killed cluster for a minute before they end."""


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
    assert differences(metrics_of(tmp_path), metrics_of(uninterrupted)) == []


@pytest.mark.slow
def test_every_step_changes_the_digests(uninterrupted: Path) -> None:
    earlier, last = state_digests(uninterrupted / "checkpoints/step_000006"), state_digests(uninterrupted / LAST)
    assert earlier.keys() == last.keys() == {"actor", "critic"}
    assert all(earlier[role] != last[role] for role in last)


def kill_where_it_pauses(toy: Toy, folder: Path, overrides: list[str]) -> None:
    """Start the command, SIGKILL the driver where a worker pauses, and wait until nothing of the run is left."""
    run_id = uuid.uuid4().hex
    log = folder / "killed.log"
    with log.open("w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "hybridflow.train", str(toy.config), f"run.folder={folder}", *overrides],
            env={**os.environ, RUN_ID: run_id},
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
    wait_until(lambda: not working(run_id), lambda: f"processes outlived their driver: {working(run_id)}", timeout_s=30)
    for process in processes_of(run_id):
        os.kill(process, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], problem: Callable[[], str], *, timeout_s: float = 90.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.05)


def working(run_id: str) -> list[str]:
    """Command lines of the run's processes that hold memory or compute."""
    return [command for command in processes_of(run_id).values() if not command.startswith(AGENTS)]


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
