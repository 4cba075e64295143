"""Weights to the engines, as the controller sees it: what goes wrong on one side is told although the other side waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from hybridflow.batch import Batch
from hybridflow.config.schema import Config, ModelConfig, PlacementConfig, RolloutConfig
from hybridflow.controller import weights
from hybridflow.controller.cost import CallLog
from hybridflow.controller.launch import Launched
from hybridflow.controller.placement import places
from hybridflow.controller.weights import WeightSync
from hybridflow.errors import WeightMismatchError, WorkerDiedError, WorkerError
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.data import DataSummary
from hybridflow.workers.remote import remote
from hybridflow.workers.rollout import RolloutWorker
from tests.training_rows import context_of
from tests.unit.local_groups import LocalDispatcher

SEPARATE = PlacementConfig(pools={"main": "1x1", "gen": "1x1"}, roles={"rollout": "gen"})


def failure(role: str, method: str, kind: type[WorkerError] = WorkerError) -> WorkerError:
    return kind(role=role, rank=0, node="here", method=method, cause="a cause")


class FakeActor(ActorWorker):
    """Has weights; `failing` names the methods that raise."""

    def __init__(self, failing: dict[str, WorkerError]):
        Worker.__init__(self, Config(), context_of("actor"))
        self.failing = failing

    def act(self, method: str) -> None:
        if method in self.failing:
            time.sleep(0.1)  # the other side is under way
            raise self.failing[method]

    @remote("rank_zero")
    def num_updates(self) -> int:
        return 1

    @remote("rank_zero")
    def transfer_address(self, receiver: str = "rollout") -> str:
        return "here:1"

    @remote("one_to_all")
    def open_transfer(self, address: str, receiver: str = "rollout") -> None:
        self.act("open_transfer")

    @remote("one_to_all")
    def send_weights(self, receiver: str = "rollout") -> Metrics:
        self.act("send_weights")
        return Metrics({"sync/send_seconds": 1.0})


class FakeRollout(RolloutWorker):
    """Waits for an actor that fails, as an engine does in a collective; raises what `failing` names."""

    def __init__(self, actor: FakeActor, failing: dict[str, WorkerError]):
        Worker.__init__(self, Config(), context_of("rollout"))
        self.actor, self.failing, self.may_end = actor, failing, threading.Event()
        self.version = 0

    def act(self, method: str, partner: str) -> None:
        if method in self.failing:
            raise self.failing[method]
        if partner in self.actor.failing:
            self.may_end.wait()

    @remote("one_to_all")
    def open_transfer(self, address: str) -> None:
        self.act("open_transfer", "open_transfer")

    @remote("one_to_all")
    def receive_weights(self, version: int = 0) -> Metrics:
        self.act("receive_weights", "send_weights")
        self.version = version
        return Metrics({"sync/seconds": 2.0})

    @remote("one_to_all")
    def sleep(self) -> None:
        self.act("sleep", "")

    @remote("one_to_all")
    def wake_up(self) -> None:
        pass


class Sides:
    """A sync between fakes on pools of their own."""

    def __init__(self) -> None:
        self.actor = FakeActor({})
        self.rollout = FakeRollout(self.actor, {})
        config = Config(model=ModelConfig(path="model"), rollout=RolloutConfig(), placement=SEPARATE)
        groups = {
            "actor": FakeActor.group(LocalDispatcher([self.actor], Layout(), pool_name="main")),
            "rollout": FakeRollout.group(LocalDispatcher([self.rollout], Layout(), pool_name="gen")),
        }
        launched = Launched(
            groups,
            places(config, tuple(groups)),
            CallLog(),
            DataSummary(num_prompts=1, steps_per_epoch=1, num_validation_prompts=0),
            engine_sleeps=True,
        )
        self.sync = WeightSync(launched, engines=launched.rollout, lets_sleep=True)


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    monkeypatch.setattr(weights, "DEATHS_SHOW_S", 0.5)
    sides = Sides()
    yield sides
    sides.rollout.may_end.set()


def test_metrics_of_both_sides_are_those_of_the_sync(sides: Sides) -> None:
    assert dict(sides.sync.sync(version=1)) == {"sync/seconds": 2.0, "sync/send_seconds": 1.0}
    assert dict(sides.sync.sync(version=2)) == {}, "nothing has changed since"
    assert sides.rollout.version == 1, "engines are told which policy they have"


@pytest.mark.parametrize("method", ["open_transfer", "send_weights"])
def test_an_actor_that_fails_is_told_while_the_engines_still_wait_for_it(sides: Sides, method: str) -> None:
    sides.actor.failing[method] = failure("actor", method)
    with pytest.raises(WorkerError, match=f"actor.{method} failed on rank 0"):
        sides.sync.sync(version=1)


def test_an_actor_that_died_is_told_rather_than_the_connection_that_it_closed(sides: Sides) -> None:
    sides.actor.failing["send_weights"] = failure("actor", "send_weights", WorkerDiedError)
    sides.rollout.failing["receive_weights"] = failure("rollout", "receive_weights")
    with pytest.raises(WorkerDiedError, match=r"actor\.send_weights"):
        sides.sync.sync(version=1)


def test_engines_that_could_not_fall_asleep_are_told_at_the_next_sync(sides: Sides) -> None:
    sides.rollout.failing["sleep"] = failure("rollout", "sleep")
    sides.sync.sleep()
    with pytest.raises(WorkerError, match=r"rollout\.sleep failed"):
        sides.sync.sync(version=1)


EXPERTS = ("layers.0.experts.down_proj", "layers.1.experts.down_proj")


class PerturbedActor(FakeActor):
    """Differs from its engines by as much as `differences` says, before and after signs were flipped."""

    def __init__(self, differences: tuple[float, float]):
        super().__init__({})
        self.differences, self.are_flipped, self.flips = differences, False, 0

    @remote("one_to_all")
    def flip_signs(self, names: tuple[str, ...]) -> None:
        assert names == EXPERTS
        self.are_flipped, self.flips = not self.are_flipped, self.flips + 1

    @remote("split_by_data_rank")
    def probe_differences(self, rows: Batch) -> Batch:
        return Batch({"difference": np.full(len(rows), self.differences[self.are_flipped])})


class ProbedRollout(FakeRollout):
    @remote("one_to_all")
    def unreadable_weights(self) -> tuple[str, ...]:
        return EXPERTS

    @remote("gather_rows")
    def probe_rows(self) -> Batch:
        return Batch({"tolerance": np.full(2, 0.01)})


def probed(differences: tuple[float, float]) -> tuple[PerturbedActor, WeightSync]:
    """Engines of another pool that say which weights they cannot show."""
    actor = PerturbedActor(differences)
    groups = {
        "actor": PerturbedActor.group(LocalDispatcher([actor], Layout(), pool_name="main")),
        "rollout": ProbedRollout.group(LocalDispatcher([ProbedRollout(actor, {})], Layout(), pool_name="gen")),
    }
    config = Config(model=ModelConfig(path="model"), rollout=RolloutConfig(), placement=SEPARATE)
    summary = DataSummary(num_prompts=1, steps_per_epoch=1, num_validation_prompts=0)
    launched = Launched(groups, places(config, tuple(groups)), CallLog(), summary, engine_sleeps=False)
    return actor, WeightSync(launched, engines=launched.rollout, verifies=True)


def test_engines_of_another_pool_are_probed_and_weights_are_what_they_were_afterwards() -> None:
    actor, sync = probed((1e-5, 1e-5))
    sync.sync(version=1)
    assert (actor.flips, actor.are_flipped) == (2, False)


def test_an_engine_of_another_pool_that_computes_otherwise_is_told() -> None:
    _, sync = probed((0.5, 0.5))
    with pytest.raises(WeightMismatchError, match=r"differ from the trainer's by up to 0\.5 nats"):
        sync.sync(version=1)


def test_an_engine_of_another_pool_that_takes_no_values_is_told_and_weights_are_what_they_were() -> None:
    actor, sync = probed((1e-5, 0.5))
    with pytest.raises(WeightMismatchError, match=r"with other values of layers\.\*\.experts\.down_proj its"):
        sync.sync(version=1)
    assert not actor.are_flipped
