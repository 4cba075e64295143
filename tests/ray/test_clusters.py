"""Clusters that were there before the run: several nodes of this machine, started as the documentation says."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ray.processes import StartedProcess, started, training, wait_until
from tests.ray.runs import Toy, metrics_of

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
CLUSTER = {"RAY_AUTH_MODE": "disabled", "RAY_DISABLE_USAGE_STATS": "1", "RAY_ADDRESS": "", "PYTHONPATH": ""}
"""The nodes know nothing of this checkout, and a token in the home folder plays no part."""


@dataclass
class Head:
    """The first node of a cluster."""

    node: StartedProcess
    address: str
    dashboard: str

    def ray_job(self, do: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...` to its end."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", do, "--address", self.dashboard, *arguments]
        environment = {**os.environ, **CLUSTER}
        return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=120, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ray_node(folder: Path, *options: str) -> Iterator[StartedProcess]:
    """One node with four CPU slots, which works in another folder than the test."""
    folder.mkdir()
    ports = ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    arguments = ["start", "--block", "--num-cpus=4", f"--temp-dir={folder}", *ports, *options]
    with started("ray.scripts.scripts", arguments, folder / "log", environment=CLUSTER, folder=folder) as node:
        wait_until(lambda: "Ray runtime started" in node.log.read_text(), node.log.read_text)
        yield node


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, since sockets below it may have no more than 107 characters."""
    with tempfile.TemporaryDirectory(prefix="hf", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture
def head(folder: Path) -> Iterator[Head]:
    port, dashboard = free_port(), free_port()
    options = ["--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    with ray_node(folder / "head", *options) as node:
        yield Head(node, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")


def test_ranks_on_two_nodes_train_and_the_loss_of_one_is_told(toy: Toy, head: Head, folder: Path, tmp_path: Path) -> None:
    arguments = [
        *("toy.yaml", f"run.ray_address={head.address}", f"run.folder={tmp_path / 'run'}"),
        *("run.total_steps=100000", "placement.pools.main=2x2", "data.train_files=train.parquet"),
    ]
    with ray_node(folder / "second", f"--address={head.address}") as second:
        environment = {**CLUSTER, "PYTHONPATH": str(REPOSITORY)}
        with training(arguments, tmp_path / "log", environment=environment, folder=toy.folder) as run:
            run.wait_for(tmp_path / "run/metrics.jsonl")
            wait_until(lambda: len(metrics_of(tmp_path / "run")) > 2, run.log.read_text)
            ranks = [sum("RankProcess" in command for command in node.working()) for node in (head.node, second)]
            assert ranks in ([2, 3], [3, 2]), "two of the pool on each, and one that reads data and scores"
            second.kill_all()
            assert run.wait() == 1
            assert "The process died before it answered (killed, out of memory, or its node was lost)" in run.log.read_text()
        wait_until(lambda: not of_the_run(head), lambda: f"outlived the run: {of_the_run(head)}", timeout_s=30)


def test_a_submitted_job_trains_and_leaves_no_rank_when_it_is_stopped(toy: Toy, head: Head, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(REPOSITORY / "hybridflow", sent / "hybridflow", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(toy.model, sent / "model")
    shutil.copy(toy.config, sent)
    shutil.copy(toy.data, sent)
    training_there = [
        *("--working-dir", str(sent), "--", sys.executable, "-m", "hybridflow.train", "toy.yaml", "run.total_steps=100000"),
        *("model.path=model", "data.train_files=train.parquet"),
    ]
    refused = head.ray_job("submit", *training_there, "run.folder=outputs")
    assert refused.returncode == 1
    assert "run.folder: found outputs, which would lie in the copy of the working folder" in refused.stdout + refused.stderr

    submitted = head.ray_job("submit", "--no-wait", "--submission-id=long", *training_there, f"run.folder={tmp_path / 'run'}")
    assert submitted.returncode == 0, submitted.stderr
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics_of(tmp_path / "run")) > 1, lambda: head.ray_job("logs", "long").stdout)
    assert "ready for the first step" in head.ray_job("logs", "long").stdout
    assert sum("RankProcess" in command for command in of_the_run(head)) == 2
    assert head.ray_job("stop", "long").returncode == 0
    wait_until(lambda: not of_the_run(head), lambda: f"outlived the job: {of_the_run(head)}", timeout_s=30)


def of_the_run(head: Head) -> list[str]:
    """Processes of a run on the first node: the controller, ranks, and what they have started."""
    return [command for command in head.node.working() if "RankProcess" in command or "hybridflow" in command]
