"""A rank that has no requests of its own, and steps its part of an engine with those of the first."""

from __future__ import annotations

import time

import pytest

from hybridflow.rollout.step_thread import EngineThread
from tests.unit.test_step_thread import TwoRanks, request


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_follows_steps_with_the_requests_of_the_first(late: int) -> None:
    ranks = TwoRanks(follows=True)

    def work(thread: EngineThread) -> None:
        for number in range(5):
            if thread is ranks.threads[0]:  # the other is given nothing, and pauses when it is told to
                futures = [future for _ in range(3) for future in thread.submit([request(1, max_tokens=10**6), request(13)])]
                time.sleep(0.002)
                thread.interrupt()
                assert all(future.done() for future in futures)
                assert len(thread.generate([request(2, max_tokens=5)])[0].tokens) == 5
            for _ in range(2):
                with thread.paused() as engine:
                    time.sleep(0.01 if thread is ranks.threads[number % 2] else 0)
                    assert engine.num_unfinished == 0

    ranks.both(work, late=late)
    assert len(ranks.steps[1]) >= 25
    ranks.close()
