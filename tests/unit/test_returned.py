"""What a user's methods return is judged where it comes from, with its name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.schema import Config as RunConfig
from hybridflow.config.schema import DataConfig, TrackerConfig
from hybridflow.controller.loop import Loop
from hybridflow.controller.returned import ROUNDS_WITHOUT_A_PROMPT, bounded_keep, checked_collect
from hybridflow.controller.stream import Stream, StreamSettings
from hybridflow.errors import ReturnError
from hybridflow.metrics import Metrics
from hybridflow.ops import Loss
from hybridflow.user_file import import_file
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.remote import checked, remote
from hybridflow.workers.reward import RewardWorker

ROWS = Batch({"group": np.arange(4)})


class Forgets(ActorWorker):
    """Whose methods have no types, as those of a user may be; the package's, which they stand for, have."""

    @remote("split_by_data_rank")
    def update(self, batch, *, loss):  # type: ignore[no-untyped-def]
        super().update(batch, loss=loss)

    @remote("split_by_data_rank")
    def own(self, batch):  # type: ignore[no-untyped-def]
        """A method of which nothing is known."""

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch, loss: Loss) -> dict[str, float]:  # type: ignore[override]
        """Promises something else than the package's."""
        return {}


class Mine(Algorithm):
    """Which keeps no prompt."""

    def __init__(self, options: GroupOptions):
        self.config = options
        self.run = RunConfig(data=DataConfig(prompts_per_step=4))

    def collect(self, prompts: Batch) -> Batch:
        return prompts

    def keep(self, group: Batch) -> bool:
        return False

    def learn(self, batch: Batch) -> Metrics:
        return Metrics()


@pytest.mark.parametrize("result", [None, {"loss": 1.0}, 0.5, ROWS, [Metrics()]])
def test_what_a_role_returns_in_place_of_metrics_is_told_with_its_class(result: object) -> None:
    with pytest.raises(ReturnError, match=r"^Forgets\.update returns a Metrics; found "):
        checked(result, Forgets, "update")


@pytest.mark.parametrize("result", [None, Metrics(), ROWS["group"]])
def test_what_a_role_returns_in_place_of_rows_is_told_with_its_class(result: object) -> None:
    with pytest.raises(ReturnError, match=r"^RewardWorker\.score returns a Batch; found "):
        checked(result, RewardWorker, "score")


def test_what_promises_nothing_or_something_else_returns_what_it_likes() -> None:
    assert checked(None, Forgets, "own") is None
    assert checked({}, Forgets, "log_probs") == {}
    assert checked(None, ActorWorker, "save") is None


OWN = """
from __future__ import annotations
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import remote

class Metrics:
    pass

class Own(Worker):
    @remote("one_to_all")
    def measured(self) -> Metrics: ...

    @remote("one_to_all")
    def later(self) -> Nowhere: ...
"""


def test_a_class_of_ones_own_may_be_called_as_one_of_the_packages(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    own: Any = import_file(str(tmp_path / "own.py"))
    result = own.Metrics()
    assert checked(result, own.Own, "measured") is result
    assert checked(result, own.Own, "later") is result


class NoRanks:
    """What is launched, syncs and gives rows, where nobody takes part in a step but the algorithm."""

    groups: dict[str, object] = {}  # noqa: RUF012

    @property
    def log(self) -> NoRanks:
        return self

    def drain(self) -> Metrics:
        return Metrics()

    def sync(self, *, version: int) -> Metrics:
        return Metrics()

    def sleep(self) -> None:
        """No engine does."""

    def take(self, step: int) -> tuple[Batch, None]:
        return ROWS, None


class LocalLoop(Loop):
    """A loop whose steps are taken here."""

    def __init__(self, algorithm: Any):
        parts: Any = NoRanks()
        self.config = RunConfig(trackers=TrackerConfig(save_rollouts="none"))
        self.algorithm, self.total_steps = algorithm, 2
        self.launched = self.weights = self.rows = parts


@pytest.mark.parametrize("result", [None, {"a": 1.0}, ROWS])
def test_what_an_algorithm_returns_in_place_of_metrics_is_told(result: object) -> None:
    loop = LocalLoop(type("Mine", (), {"learn": lambda self, batch: result})())
    with pytest.raises(ReturnError, match=r"Mine\.learn returns a Metrics; found "):
        loop.step(1)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (None, "found nothing: is a `return` missing"),
        ([1, 2], r"found \[1, 2\], a list"),
        (ROWS.select([]), "no rows for 4 prompts"),
    ],
)
@pytest.mark.parametrize("staleness", [0, 1])
def test_what_collect_returns_in_place_of_rows_ends_the_run(result: object, problem: str, staleness: int) -> None:
    algorithm: Any = type("Mine", (), {"collect": lambda self, prompts: result})()
    stream = stream_of(checked_collect(algorithm), lambda rows: True, staleness)
    with pytest.raises(ReturnError, match=problem.replace("4", "." if staleness else "4")):
        stream.take(1)


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_algorithm_that_keeps_nothing_ends_the_run(staleness: int) -> None:
    stream = stream_of(lambda prompts: prompts, bounded_keep(Mine(GroupOptions())), staleness)
    with pytest.raises(ReturnError, match=rf"Mine\.keep has refused {4 * ROUNDS_WITHOUT_A_PROMPT} prompts in a row"):
        stream.take(1)


def test_more_rounds_than_that_are_the_algorithms_to_allow() -> None:
    keep = bounded_keep(Mine(GroupOptions(dynamic_sampling=True, max_rounds=100)))
    assert not any(keep(ROWS) for _ in range(4 * 100 - 1))
    with pytest.raises(ReturnError, match=r"refused 400 prompts in a row, 100 steps' worth"):
        keep(ROWS)


def stream_of(collect: Any, keep: Any, staleness: int) -> Stream:
    settings = StreamSettings(prompts_per_step=4, max_staleness=staleness, total_steps=3)
    return Stream(settings, lambda step, count: Batch({"group": np.arange(count)}), collect, keep)
