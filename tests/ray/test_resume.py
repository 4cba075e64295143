"""A run that is killed and started again ends exactly where it would have ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.conftest import SharedCluster
from tests.ray.pausing_workers import MARKER
from tests.ray.processes import training, wait_until
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


@pytest.fixture(scope="module")
def uninterrupted(toy: Toy, shared_cluster: SharedCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of nine steps that nothing disturbs."""
    shared_cluster.become("forked")
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
    """Start the command, SIGKILL the driver where a worker pauses, and see that nothing of the run goes on without it."""
    with training([str(toy.config), f"run.folder={folder}", *overrides], folder / "killed.log") as run:
        run.wait_for(folder / MARKER)
        assert sum("RankProcess" in command for command in run.working()) == 2
        run.kill()
        wait_until(lambda: not run.working(), lambda: f"outlived the driver: {run.working()}", timeout_s=30)
