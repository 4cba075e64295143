"""Trackers are tried before Ray starts, and those of other people's services work with their own libraries."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridflow.config.schema import Config, RunConfig, TrackerConfig
from hybridflow.errors import ConfigError
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker, Trackers, run_folder
from hybridflow.trackers.trial import try_trackers

SAMPLE = Sample(prompt="1+1=", response="2", ground_truth="2", reward=1.0)


def config(folder: Path, *names: str) -> Config:
    return Config(run=RunConfig(folder=str(folder)), trackers=TrackerConfig(names=names, project="toy"))


class WithoutKey(Tracker):
    """A service of the user's own that refuses."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        raise PermissionError("no key in MY_KEY\nand much more")

    def log(self, step: int, metrics: Metrics) -> None:
        raise AssertionError("never built")


class Exits(Tracker):
    """A library that ends the process where it has no key."""

    @classmethod
    def check(cls, config: Config) -> None:
        sys.exit("no key")

    def log(self, step: int, metrics: Metrics) -> None:
        raise AssertionError("never built")


class Sleeping(Tracker):
    """A service that takes the connection and says nothing."""

    @classmethod
    def check(cls, config: Config) -> None:
        time.sleep(60)

    def log(self, step: int, metrics: Metrics) -> None:
        raise AssertionError("never built")


class Writing(Tracker):
    """Leaves a file where it thinks that the run is."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        (run_folder(config) / "written").touch()

    def log(self, step: int, metrics: Metrics) -> None: ...


@pytest.fixture
def silent_server() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        kept: list[socket.socket] = []
        threading.Thread(target=lambda: kept.append(server.accept()[0]), daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_tracker_that_cannot_be_built_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        try_trackers(config(tmp_path, "console", f"{__name__}:WithoutKey"))
    (error,) = caught.value.errors
    assert "no key in MY_KEY. Repair it, or leave it out" in str(error)
    assert "\n" not in str(error)


def test_a_tracker_that_would_end_the_process_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Exits' cannot start: no key"):
        try_trackers(config(tmp_path, f"{__name__}:Exits"))


def test_a_trial_that_never_ends_is_given_up(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"Sleeping' does not answer within 0\.2 s"):
        try_trackers(config(tmp_path, f"{__name__}:Sleeping"), limit_s=0.2)
    assert time.monotonic() - started < 5


def test_a_trial_leaves_nothing_in_the_folder_of_the_run(tmp_path: Path) -> None:
    try_trackers(config(tmp_path / "run", "console", "tensorboard", f"{__name__}:Writing"))
    assert not (tmp_path / "run").exists()


def test_all_trackers_are_tried_before_any_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 errors"):
        try_trackers(config(tmp_path, f"{__name__}:WithoutKey", "tensorbord"))


def test_a_service_that_went_down_after_its_trial_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(config(tmp_path, f"{__name__}:WithoutKey"), 10, 0)
    trackers.log(1, Metrics({"reward/mean": 0.5}))
    trackers.close()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "'wandb' finds no API key. Set WANDB_API_KEY"),
        ({"WANDB_API_KEY": "short"}, "'wandb' cannot start: WANDB_API_KEY invalid"),
    ],
)
def test_wandb_without_a_key_is_told_in_one_line(tmp_path: Path, environment: dict[str, str], said: str) -> None:
    pytest.importorskip("wandb")
    code = "from tests.unit.test_tracker_trials import *; import sys; try_trackers(config(Path(sys.argv[1]), 'wandb'))"
    done = run_python(code, tmp_path, environment)
    assert f"  trackers.names: {said}" in done.stderr


def test_servers_that_refuse_or_say_nothing_are_given_up_soon(tmp_path: Path, silent_server: str) -> None:
    pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    environment = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9", "MLFLOW_TRACKING_URI": silent_server}
    code = (
        "from tests.unit.test_tracker_trials import *; import sys; "
        "try_trackers(config(Path(sys.argv[1]), 'wandb', 'mlflow'), limit_s=15)"
    )
    started = time.monotonic()
    done = run_python(code, tmp_path, environment)
    assert "'wandb' cannot start" in done.stderr or "'wandb' does not answer" in done.stderr
    assert "'mlflow' does not answer within 15 s" in done.stderr
    assert time.monotonic() - started < 60


def run_python(code: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`code` in a process of its own with no trace of this machine's keys."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env=inherited | {"HOME": str(folder), "NETRC": str(folder / "netrc"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_wandb_takes_a_run_offline_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try_trackers(config(tmp_path, "wandb"))
    for resume_step in (0, 2):
        trackers = Trackers(config(tmp_path, "wandb"), 4, resume_step)
        trackers.log(resume_step + 1, Metrics({"reward/mean": 0.5}))
        trackers.log_samples(resume_step + 1, [SAMPLE])
        trackers.close()
    run_id = (tmp_path / "wandb_run_id").read_text()
    written = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    deadline = time.monotonic() + 30  # wandb's own process may write a moment longer
    while not all(b"reward/mean" in path.read_bytes() for path in written) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert written and all(b"reward/mean" in path.read_bytes() for path in written)


def test_mlflow_has_every_metric_at_its_step_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    try_trackers(config(tmp_path, "mlflow"))
    for resume_step in (0, 2):
        trackers = Trackers(config(tmp_path, "mlflow"), 4, resume_step)
        trackers.log(resume_step + 1, Metrics({"reward/mean": 0.5, "validation/a@2/x": 1.0, "empty": float("nan")}))
        trackers.log_samples(resume_step + 1, [SAMPLE])
        trackers.close()
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["actor.learning_rate"] == "1e-06"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward/mean")] == [(1, 0.5), (3, 0.5)]
    assert run.data.metrics["validation/a_2/x"] == 1.0
    (first, _) = sorted((tmp_path / "mlflow_artifacts").rglob("step_*.json"))
    assert json.loads(first.read_text())["samples"][0]["response"] == "2"
