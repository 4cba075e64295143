"""A small Ray cluster that tests share, and groups of fake workers on it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import pytest
import ray
from ray.util.placement_group import placement_group_table

from hybridflow.config.pools import parse_pool
from hybridflow.config.schema import Config
from hybridflow.controller.cost import CallLog
from hybridflow.controller.group import GroupDispatcher, Pool
from hybridflow.controller.placement import introduce, start_pool
from hybridflow.parallel.layout import Layout
from tests.ray.fake_workers import EchoWorker
from tests.ray.forked_workers import forked_workers
from tests.ray.processes import wait_until
from tests.ray.runs import Toy, make_toy

FAKE = "tests.ray.fake_workers:EchoWorker"
NUM_CPUS = 8
ENDS_WITHIN_S = 15.0
"""For the processes of a test, after it."""

Kind = Literal["none", "forked", "ordinary"]


class SharedCluster:
    """The cluster that this process is connected to: one for all tests in a row that want the same kind."""

    def __init__(self, open_until_the_end: ExitStack) -> None:
        self.kind: Kind = "none"
        self.python: Path | None = None
        self.open_until_the_end = open_until_the_end

    def become(self, kind: Kind) -> None:
        """Have a cluster of this kind; `none` ends the present one."""
        if kind == self.kind:
            return
        ray.shutdown()
        self.kind = kind
        if kind == "none":
            return
        with pytest.MonkeyPatch.context() as patch:
            if kind == "forked":
                patch.setattr(sys, "executable", str(self.forking_python()))
            ray.init(num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)

    def check_that_nothing_is_left(self) -> None:
        """Whatever a test started has ended, or else it fails and the next one begins with a cluster of its own."""
        try:
            wait_until(
                lambda: not self._left(),
                lambda: f"the test left in the shared cluster: {self._left()}",
                timeout_s=ENDS_WITHIN_S,
            )
        except AssertionError:
            self.become("none")
            raise

    def forking_python(self) -> Path:
        """In place of the interpreter: it has workers forked with their imports done."""
        if self.python is None:
            folder = self.open_until_the_end.enter_context(tempfile.TemporaryDirectory())
            self.python = self.open_until_the_end.enter_context(forked_workers(Path(folder)))
        return self.python

    def _left(self) -> list[str]:
        """CPU slots, placement groups and named actors that somebody still has."""
        if self.kind == "none":
            return []
        groups = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
        slots = NUM_CPUS - ray.available_resources().get("CPU", 0.0)
        names = ray.util.list_named_actors(all_namespaces=True)
        return [f"{slots} CPU slots"] * (slots > 0) + [str(found) for found in (*groups, *names)]


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[SharedCluster]:
    """Ended with the last test."""
    with ExitStack() as open_until_the_end:
        shared = SharedCluster(open_until_the_end)
        yield shared
        shared.become("none")


@pytest.fixture(scope="session")
def forking(shared_cluster: SharedCluster) -> Path:
    """For the beginning of PYTHONPATH: the processes of a cluster that a command begins are forked too."""
    return shared_cluster.forking_python().parent


@pytest.fixture
def cluster(shared_cluster: SharedCluster) -> Iterator[None]:
    """Eight CPU slots, whose processes are forked with their imports done: a short run takes a third of the time."""
    shared_cluster.become("forked")
    yield
    shared_cluster.check_that_nothing_is_left()


@pytest.fixture
def ordinary_cluster(shared_cluster: SharedCluster) -> Iterator[None]:
    """Eight CPU slots, whose processes are started as Ray does."""
    shared_cluster.become("ordinary")
    yield
    shared_cluster.check_that_nothing_is_left()


@pytest.fixture
def no_cluster(shared_cluster: SharedCluster) -> None:
    """This process is connected to none."""
    shared_cluster.become("none")


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
