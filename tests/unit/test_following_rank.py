"""A rank that has no requests of its own, and steps its part of an engine with those of the first."""

from __future__ import annotations

import queue
import time

import numpy as np
import pytest

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config
from hybridflow.errors import BatchError, EngineError
from hybridflow.rollout.base import Sampling
from hybridflow.rollout.step_thread import Decision, EngineThread
from hybridflow.rollout.under_way import RowsElsewhere, RowsUnderWay, RowUnderWay
from hybridflow.workers.base import Worker
from hybridflow.workers.rollout import RolloutWorker
from tests.toy import make_tiny_tokenizer
from tests.training_rows import context_of, training_config
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

    leader = EngineThread(first, agree=tell, leads=True, is_followed=True)
    return leader, EngineThread(second, agree=lambda _: decisions.get(), follows=True)


def taking(rows: RowsUnderWay, results: queue.SimpleQueue[object]) -> None:
    try:
        with rows.engine.handing_out():
            taken = rows.take(1)
        results.put([row.number for row in taken])
    except EngineError as error:
        results.put(error)


def row(number: int, *, max_tokens: int) -> RowUnderWay:
    return RowUnderWay(number, np.arange(3, dtype=np.int32), Sampling(max_tokens=max_tokens), seed=number)


def test_a_failure_on_a_rank_that_follows_is_told_by_the_call_in_which_it_happens() -> None:
    leader, follower = two_ranks(InterruptibleEngine(), InterruptibleEngine(fails_at_step=3))
    elsewhere = RowsElsewhere(follower, lambda tokens: "")
    results: queue.SimpleQueue[object] = queue.SimpleQueue()
    waiting = run_in_thread(lambda: taking(elsewhere, results), daemon=True)
    time.sleep(0.05)
    assert results.empty(), "it waits for the first rank, which has not been given anything yet"
    leader.generate([request(1, max_tokens=9)])  # the first hears of nothing, as these engines do not wait for each other
    waiting.join(10)
    assert "failed before: out of memory" in str(results.get(timeout=10))
    with pytest.raises(EngineError, match="out of memory"), follower.handing_out():
        pass
    leader.close()
    follower.close()


@pytest.mark.parametrize("comes_first", [0, 1])
def test_a_rank_that_follows_answers_when_the_first_has_handed_out_its_rows(comes_first: int) -> None:
    leader, follower = two_ranks(InterruptibleEngine(), InterruptibleEngine())
    here, elsewhere = RowsUnderWay(leader, lambda tokens: ""), RowsElsewhere(follower, lambda tokens: "")
    for number in range(3):
        here.submit([row(number, max_tokens=4)])
        results: tuple[queue.SimpleQueue[object], ...] = (queue.SimpleQueue(), queue.SimpleQueue())
        calls = [lambda: taking(here, results[0]), lambda: taking(elsewhere, results[1])]  # noqa: B023
        first = run_in_thread(calls[comes_first], daemon=True)
        time.sleep(0.02)
        second = run_in_thread(calls[1 - comes_first], daemon=True)
        for call in (first, second):
            call.join(10)
            assert not call.is_alive()
        assert results[0].get() == [number] and results[1].get() == []
    leader.close()
    follower.close()


class OfThread(RolloutWorker):
    """With an engine that runs already."""

    def __init__(self, config: Config, thread: EngineThread, *, follows: bool):
        Worker.__init__(self, config, context_of("rollout"))
        self.engine, self.follows, self.environment = thread, follows, None
        self.tokenizer, self.num_calls = make_tiny_tokenizer(), 0
        self.rows = self._no_rows()


def test_a_call_that_fails_on_the_first_rank_before_its_engine_has_rows_ends_on_one_that_follows() -> None:
    threads = two_ranks(InterruptibleEngine(), InterruptibleEngine())
    config = training_config("")
    first, second = (OfThread(config, thread, follows=rank == 1) for rank, thread in enumerate(threads))
    columns = {"prompt": Ragged.from_rows([np.arange(3)], np.int32), "seed": np.array([1])}
    batch, without_prompts = Batch.from_columns(columns), Batch({"seed": np.array([1])})
    sampling = Sampling(max_tokens=3, log_probs=False)
    for given in (without_prompts, batch, without_prompts, batch):
        answered: queue.SimpleQueue[Batch] = queue.SimpleQueue()
        following = run_in_thread(lambda: answered.put(second.generate(batch, sampling=sampling)), daemon=True)  # noqa: B023
        time.sleep(0.02)
        assert answered.empty(), "it waits for the first rank"
        if given is batch:
            assert len(first.generate(given, sampling=sampling)) == 1
        else:
            with pytest.raises(BatchError):
                first.generate(given, sampling=sampling)
        assert len(answered.get(timeout=10)) == 0
        following.join(10)
    for thread in threads:
        thread.close()


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
