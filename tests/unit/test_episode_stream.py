"""Episodes in the stream: calls of many collects together, paused, and gone on with after a restart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridflow.batch import Batch
from hybridflow.controller.row_source import _by_call
from hybridflow.controller.streaming import Generation
from hybridflow.parallel.layout import Layout
from hybridflow.workers.rollout import RolloutWorker
from tests.unit.episodes import episode_config, episode_rows, worker_of
from tests.unit.local_groups import LocalDispatcher

ENVIRONMENT = """
import asyncio

class Slow:
    def reset(self, row):
        self.turns = 0
        return row["messages"], {}

    async def step(self, message):
        self.turns += 1
        if message["content"] and self.turns == 2:
            await asyncio.sleep(0.2)
        return [{"role": "user", "content": f"turn {self.turns}"}], 1.0, self.turns == 3, False, {}
"""
Start = Callable[[], Generation]


@pytest.fixture
def start(tiny_model: str, tmp_path: Path) -> Iterator[Start]:
    begun: list[tuple[RolloutWorker, Generation]] = []

    def start() -> Generation:
        file = tmp_path / "environment.py"
        file.write_text(ENVIRONMENT)
        worker = worker_of(episode_config(tiny_model, file))
        group = RolloutWorker.group(LocalDispatcher([worker], Layout(), pool_name="main"))
        begun.append((worker, Generation(group, on_failure=lambda error: None)))
        return begun[-1][1]

    yield start
    for worker, generation in begun:
        generation.close()
        worker.close()


def groups() -> list[Batch]:
    rows = episode_rows(["a", "b", "c", "d"]).without(["position", "call"]).with_columns(group=np.array([0, 0, 1, 1]))
    return [rows.select([0, 1]), rows.select([2, 3])]


def said(answers: list[Batch]) -> list[list[int]]:
    return [row.tolist() for answer in answers for row in answer.tokens("response")]


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.3, 1.0])
def test_paused_and_restarted_episodes_say_what_they_would_have_said(start: Start, seconds: float) -> None:
    generation = start()
    calls = [generation.generate(rows) for rows in groups()]
    generation.resume()
    time.sleep(seconds)
    generation.pause()
    kept = generation.started()
    generation.resume()
    expected = [call.result(60) for call in calls]
    again = start()
    again.begun = {} if kept is None else _by_call(kept)
    calls = [again.generate(rows) for rows in groups()]
    again.resume()
    found = [call.result(60) for call in calls]
    assert said(found) == said(expected)
    for answers in (expected, found):
        assert [answer["episode_reward"].tolist() for answer in answers] == [[3.0, 3.0]] * 2
        assert all("position" not in answer and "loss_mask" in answer for answer in answers)
