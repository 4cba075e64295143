"""A rank that has no requests of its own, and steps its part of an engine with those of the first."""

from __future__ import annotations

import queue
import time

import pytest

from hybridflow.errors import EngineError
from hybridflow.rollout.step_thread import Decision, EngineThread
from hybridflow.rollout.under_way import RowsElsewhere
from tests.unit.test_step_thread import InterruptibleEngine, TwoRanks, request, run_in_thread


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


def two_ranks(first: InterruptibleEngine, second: InterruptibleEngine) -> tuple[EngineThread, EngineThread]:
    """Engines that do not wait for each other, of which the second follows."""
    decisions: queue.SimpleQueue[Decision] = queue.SimpleQueue()

    def tell(decision: Decision) -> Decision:
        decisions.put(decision)
        return decision

    return EngineThread(first, agree=tell, leads=True), EngineThread(second, agree=lambda _: decisions.get(), follows=True)


def test_a_failure_on_a_rank_that_follows_is_raised_where_its_rows_are_asked_for() -> None:
    leader, follower = two_ranks(InterruptibleEngine(), InterruptibleEngine(fails_at_step=2))
    rows = RowsElsewhere(follower, lambda tokens: "")
    assert rows.take(1) == []
    leader.generate([request(1, max_tokens=9)])
    follower._thread.join(10)
    with pytest.raises(EngineError, match="failed before: out of memory"):
        rows.take(1)
    leader.close()
    follower.close()


def test_a_rank_that_follows_can_be_closed_after_the_first_has_failed() -> None:
    leader, follower = two_ranks(InterruptibleEngine(fails_at_step=2), InterruptibleEngine())
    with pytest.raises(EngineError, match="out of memory"):
        leader.generate([request(1, max_tokens=9)])
    leader.close()
    closing = run_in_thread(follower.close, daemon=True)
    closing.join(10)
    assert not closing.is_alive()


def test_a_rank_that_has_failed_and_does_not_lead_asks_for_no_decision_more() -> None:
    """The first may be waiting for it inside the engine, and decide nothing more."""
    asked: list[Decision] = []

    def agree(decision: Decision) -> Decision:
        asked.append(decision)
        return decision

    thread = EngineThread(InterruptibleEngine(fails_at_step=2), agree=agree)
    with pytest.raises(EngineError, match="out of memory"):
        thread.generate([request(1, max_tokens=9)])
    thread.close()
    assert not any(decision.is_closing for decision in asked)
