"""A small Ray cluster, and groups of fake workers on it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from hybridflow.config.pools import parse_pool
from hybridflow.config.schema import Config
from hybridflow.controller.cost import CallLog
from hybridflow.controller.group import GroupDispatcher, Pool
from hybridflow.controller.placement import introduce, start_pool
from hybridflow.parallel.layout import Layout
from tests.ray.fake_workers import EchoWorker
from tests.ray.forked_workers import forked_workers
from tests.ray.runs import Toy, make_toy

FAKE = "tests.ray.fake_workers:EchoWorker"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Eight CPU slots, whose processes are started as Ray does."""
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def forking_python() -> Iterator[Path]:
    """In place of the interpreter: it has workers forked with their imports done."""
    with tempfile.TemporaryDirectory() as folder, forked_workers(Path(folder)) as python:
        yield python


@pytest.fixture(scope="module")
def forked_cluster(forking_python: Path) -> Iterator[None]:
    """The same, whose processes are forked. A short run takes a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(forking_python))
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def toy(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Data, model and configuration of a toy run."""
    return make_toy(tmp_path_factory.mktemp("toy"), tiny_model)


@pytest.fixture
def pool(cluster: None) -> Iterator[Pool]:
    """Two ranks without torch.distributed."""
    started, group = start_pool("main", parse_pool("1x2 cpu"), "cpu", {})
    introduce([started], 60.0)
    yield started
    started.end()
    ray.util.remove_placement_group(group)


def make_group(pool: Pool, *, timeout_s: float = 60.0) -> EchoWorker:
    """A group of `EchoWorker` on both ranks of `pool`."""
    layout = Layout(data=len(pool.processes))
    ray.get([process.create.remote("echo", FAKE, Config(), layout) for process in pool.processes])
    return EchoWorker.group(GroupDispatcher("echo", pool, layout, timeout_s=timeout_s, log=CallLog()))
