"""The thread that steps an engine: every request ends in a response or an error."""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridflow.errors import EngineError
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Response, Sampling
from hybridflow.rollout.step_thread import Decision, EngineThread


class CountingEngine(Engine):
    """Answers each request after `max_tokens` steps with the numbers 0, 1, ...; a prompt of 13 is refused."""

    def __init__(self, *, layout: Layout | None = None, fails_at_step: int = -1, forgets: int = -1):
        super().__init__(spec(layout or Layout()))
        self.running: dict[int, list[Request | int]] = {}
        self.fails_at_step, self.forgets = fails_at_step, forgets
        self.num_steps, self.is_closed = 0, False
        self.admitted: list[tuple[int, int]] = []
        """(step, first prompt token) of each request."""
        self.may_step = threading.Event()
        self.may_step.set()

    def add(self, request: Request) -> None:
        if request.prompt[0] == 13:
            raise EngineError("13 is refused")
        if request.prompt[0] == 14:
            raise RuntimeError("14 breaks the engine")
        self.admitted.append((self.num_steps, int(request.prompt[0])))
        self.running[request.id] = [request, 0]

    def step(self) -> list[Response]:
        assert self.may_step.wait(10)
        self.num_steps += 1
        if self.num_steps == self.fails_at_step:
            raise RuntimeError("out of memory")
        finished = []
        for number, entry in list(self.running.items()):
            request = entry[0]
            entry[1] += 1
            if entry[1] == request.sampling.max_tokens:
                del self.running[number]
                if request.prompt[0] != self.forgets:
                    finished.append(answer(request))
        return finished

    @property
    def num_unfinished(self) -> int:
        return len(self.running)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.check_idle()

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())

    def close(self) -> None:
        self.is_closed = True


class InterruptibleEngine(CountingEngine):
    """Hands out what it has counted so far."""

    def interrupt(self) -> list[Response]:
        assert self.may_step.wait(10)
        partial = [(entry[0], entry[1]) for entry in self.running.values()]
        self.running.clear()
        return [
            Response(id=asked.id, tokens=np.arange(count, dtype=np.int32), log_probs=None, finish_reason="interrupted")
            for asked, count in partial
        ]


def run_in_thread(call: Callable[[], None], *, daemon: bool = False) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=daemon)
    thread.start()
    return thread


def spec(layout: Layout) -> EngineSpec:
    return EngineSpec(
        model="",
        dtype="float32",
        max_model_tokens=10**10,
        max_num_seqs=8,
        seed=0,
        device=torch.device("cpu"),
        layout=layout,
        rank=0,
        gpu_memory_utilization=0.5,
        cpu_cache_gib=1.0,
        enforce_eager=True,
    )


def request(token: int, *, max_tokens: int = 3, id: int = 0) -> Request:
    return Request(id=id, prompt=np.array([token], np.int32), sampling=Sampling(max_tokens=max_tokens))


def answer(asked: Request) -> Response:
    tokens = np.arange(asked.sampling.max_tokens, dtype=np.int32)
    return Response(id=asked.id, tokens=tokens, log_probs=None, finish_reason="length")


def test_responses_come_in_the_order_of_the_requests_with_their_ids() -> None:
    thread = EngineThread(CountingEngine())
    responses = thread.generate([request(1, max_tokens=9, id=70), request(2, max_tokens=1, id=5)])
    assert [(response.id, len(response.tokens)) for response in responses] == [(70, 9), (5, 1)]
    thread.close()


def test_several_callers_may_use_the_same_ids_at_once() -> None:
    thread = EngineThread(CountingEngine())
    lengths: dict[int, list[int]] = {}

    def call(caller: int) -> None:
        asked = [request(1, max_tokens=caller + turn, id=turn) for turn in range(1, 20)]
        lengths[caller] = [len(response.tokens) for response in thread.generate(asked)]

    callers = [threading.Thread(target=call, args=(caller,)) for caller in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert lengths == {caller: [caller + turn for turn in range(1, 20)] for caller in range(4)}
    thread.close()


def test_requests_submitted_together_start_at_the_same_step() -> None:
    engine = CountingEngine()
    thread = EngineThread(engine)
    thread.generate([request(1)] * 50)
    assert {step for step, _ in engine.admitted} == {0}
    thread.close()


def test_requests_join_those_that_run() -> None:
    engine = CountingEngine()
    thread = EngineThread(engine)
    engine.may_step.clear()
    long = thread.submit([request(1, max_tokens=50)])[0]
    short = thread.submit([request(2, max_tokens=1)])[0]
    engine.may_step.set()
    short.result(10), long.result(10)
    assert engine.admitted[1][0] < 50, "it did not wait for the end of the first"
    assert engine.num_steps == 50
    thread.close()


class SharedEngine(CountingEngine):
    """One rank's part of an engine: a step ends when both ranks make it, and they must be of the same requests."""

    def __init__(self, meet: threading.Barrier, steps: list[list[int]]):
        super().__init__(layout=Layout(tensor=2))
        self.meet, self.steps = meet, steps

    def step(self) -> list[Response]:
        self.steps.append(sorted(self.running))
        self.meet.wait(10)
        return super().step()

    def interrupt(self) -> list[Response]:
        self.steps.append([-1])
        return InterruptibleEngine.interrupt(self)


class TwoRanks:
    """Two ranks of one engine in this process."""

    def __init__(self, *, follows: bool = False) -> None:
        meet = threading.Barrier(2)
        self.decisions: queue.SimpleQueue[Decision] = queue.SimpleQueue()
        self.steps: tuple[list[list[int]], list[list[int]]] = ([], [])
        self.engines = [SharedEngine(meet, steps) for steps in self.steps]
        agreements = [self.tell, lambda _: self.decisions.get(timeout=10)]
        self.threads = [
            EngineThread(engine, agree=agree, follows=follows and rank == 1)
            for rank, (engine, agree) in enumerate(zip(self.engines, agreements, strict=True))
        ]

    def tell(self, decision: Decision) -> Decision:
        self.decisions.put(decision)
        return decision

    def both(self, call: Callable[[EngineThread], None], *, late: int | None = None) -> None:
        """Call on each rank at once; one may come late."""

        def call_one(rank: int) -> None:
            if rank == late:
                time.sleep(0.02)
            call(self.threads[rank])

        calls = [run_in_thread(partial(call_one, rank)) for rank in range(2)]
        for one in calls:
            one.join(20)
            assert not one.is_alive()

    def close(self) -> None:
        self.both(EngineThread.close)
        assert self.steps[0] == self.steps[1]


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_share_an_engine_start_requests_before_the_same_step(late: int) -> None:
    ranks = TwoRanks()
    lengths: dict[EngineThread, list[int]] = {}

    def work(thread: EngineThread) -> None:
        futures = thread.submit([request(1, max_tokens=300)])
        for number in range(30):
            futures += thread.submit([request(2, max_tokens=1 + number % 7, id=number), request(13)])
            time.sleep(0.001)
        lengths[thread] = [len(future.result(10).tokens) for future in futures if future.exception(10) is None]

    ranks.both(work, late=late)
    assert [lengths[thread] for thread in ranks.threads] == [[300, *(1 + number % 7 for number in range(30))]] * 2
    assert any(len(step) > 1 for step in ranks.steps[0]), "requests joined those that ran"
    ranks.close()


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_that_share_an_engine_are_interrupted_before_the_same_step(late: int) -> None:
    ranks = TwoRanks()
    partial_lengths: dict[EngineThread, list[int]] = {}

    def work(thread: EngineThread) -> None:
        for _ in range(5):
            futures = [future for _ in range(4) for future in thread.submit([request(1, max_tokens=10**6)])]
            time.sleep(0.002)
            thread.interrupt()
            assert all(future.result(0).finish_reason == "interrupted" for future in futures)
            partial_lengths.setdefault(thread, []).extend(len(future.result(0).tokens) for future in futures)
            with thread.paused() as engine:
                assert engine.num_unfinished == 0
            assert len(thread.generate([request(2, max_tokens=5)])[0].tokens) == 5

    ranks.both(work, late=late)
    first, second = (partial_lengths[thread] for thread in ranks.threads)
    assert first == second and len(first) == 20
    ranks.close()


def test_a_refused_request_fails_alone() -> None:
    thread = EngineThread(CountingEngine())
    futures = thread.submit([request(1), request(13), request(2)])
    assert len(futures[0].result(10).tokens) == len(futures[2].result(10).tokens) == 3
    with pytest.raises(EngineError, match="13 is refused"):
        futures[1].result(10)
    assert len(thread.generate([request(1)])) == 1
    thread.close()


def test_only_refused_requests_leave_the_thread_alive() -> None:
    thread = EngineThread(CountingEngine())
    with pytest.raises(EngineError, match="13 is refused"):
        thread.generate([request(13)])
    assert len(thread.generate([request(1)])) == 1
    thread.close()


@pytest.mark.parametrize("asked", [[1, 2], [1, 14, 2]], ids=["while stepping", "while adding"])
def test_a_failing_engine_fails_every_request_and_all_later_ones(asked: list[int]) -> None:
    thread = EngineThread(CountingEngine(fails_at_step=2))
    futures = thread.submit([request(token) for token in asked])
    for future in futures:
        with pytest.raises(EngineError, match=r"failed: RuntimeError: (out of memory|14 breaks)") as caught:
            future.result(10)
        assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(EngineError, match="failed before"):
        thread.submit([request(1)])
    with pytest.raises(EngineError, match="failed before"), thread.paused():
        pass
    thread.close()


def test_a_request_that_the_engine_forgets_is_reported() -> None:
    thread = EngineThread(CountingEngine(forgets=2))
    futures = thread.submit([request(1), request(2, max_tokens=5)])
    assert len(futures[0].result(10).tokens) == 3
    with pytest.raises(EngineError, match="1 requests were never answered"):
        futures[1].result(10)
    thread.close()


def test_a_pause_waits_for_what_runs_and_holds_back_what_comes() -> None:
    engine = CountingEngine()
    thread = EngineThread(engine)
    running = thread.submit([request(1, max_tokens=200)])[0]
    with thread.paused() as paused:
        assert running.done() and paused is engine and paused.num_unfinished == 0
        later: list[int] = []
        caller = threading.Thread(target=lambda: later.append(len(thread.generate([request(2)]))))
        caller.start()
        time.sleep(0.02)
        assert engine.num_steps == 200
    caller.join(10)
    assert later == [1]
    thread.close()


def test_closing_ends_the_engine_and_fails_what_was_not_answered() -> None:
    engine = CountingEngine()
    thread = EngineThread(engine)
    engine.may_step.clear()
    future = thread.submit([request(1, max_tokens=10**9)])[0]
    closing = threading.Thread(target=thread.close)
    closing.start()
    engine.may_step.set()
    with pytest.raises(EngineError, match="was closed"):
        future.result(10)
    closing.join(10)
    assert engine.is_closed
    with pytest.raises(EngineError, match="was closed"):
        thread.submit([request(1)])


class NotesThreads(CountingEngine):
    """Notes how many threads OpenMP would use in the thread that steps it, before torch has run anything there."""

    def add(self, request: Request) -> None:
        self.num_threads = openmp_threads()
        super().add(request)


def openmp_threads() -> int:
    """What torch's own OpenMP library says of this thread, which torch would change by being asked."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    library = next(path for path in mapped if not {"torch", "torch.libs"}.isdisjoint(Path(path).parts))
    return int(ctypes.CDLL(library).omp_get_max_threads())


def test_the_engine_runs_on_as_many_threads_as_its_process_was_given() -> None:
    before = torch.get_num_threads()
    torch._C.set_num_threads(before + 5)  # vLLM, once started in a process, has replaced the public one by a warning
    try:
        thread = EngineThread(engine := NotesThreads())
        thread.generate([request(1)])
        thread.close()
        assert engine.num_threads == openmp_threads() == before + 5
    finally:
        torch._C.set_num_threads(before)


def test_an_interrupt_resolves_what_runs_and_what_waits() -> None:
    engine = InterruptibleEngine()
    thread = EngineThread(engine)
    futures = thread.submit([request(1, max_tokens=10**9, id=70), request(2, max_tokens=2, id=5)])
    futures[1].result(10)
    engine.may_step.clear()
    waiting = thread.submit([request(3, id=9)])[0]  # or running: the thread may look before it steps
    interrupting = run_in_thread(thread.interrupt)
    time.sleep(0.02)
    engine.may_step.set()
    interrupting.join(10)
    partial = futures[0].result(0)
    assert (partial.id, partial.finish_reason) == (70, "interrupted") and len(partial.tokens) >= 2
    assert partial.tokens.tolist() == list(range(len(partial.tokens)))
    assert waiting.result(0).id == 9 and engine.num_unfinished == 0
    assert len(thread.generate([request(1)])[0].tokens) == 3
    thread.close()


def test_an_interrupt_of_an_idle_engine_returns_at_once() -> None:
    thread = EngineThread(CountingEngine())
    thread.interrupt()
    assert thread.generate([request(1)])[0].finish_reason == "length"
    thread.close()


def test_an_engine_that_cannot_stop_answers_in_full() -> None:
    thread = EngineThread(CountingEngine())
    future = thread.submit([request(1, max_tokens=100)])[0]
    thread.interrupt()
    assert future.result(0).finish_reason in ("length", "interrupted")
    thread.close()


def test_what_a_pause_holds_back_is_interrupted_too() -> None:
    engine = InterruptibleEngine()
    thread = EngineThread(engine)
    running = thread.submit([request(1, max_tokens=10**9)])[0]
    paused = threading.Event()

    def pause() -> None:
        with thread.paused():
            paused.set()

    pausing = run_in_thread(pause)
    while not thread._is_paused:
        time.sleep(0.001)
    held_back = thread.submit([request(2)])[0]
    thread.interrupt()
    assert running.result(0).finish_reason == "interrupted"
    assert held_back.result(0).tokens.tolist() == []
    pausing.join(10)
    assert paused.is_set() and len(thread.generate([request(1)])[0].tokens) == 3
    thread.close()


def test_an_engine_that_fails_in_an_interrupt_fails_every_request() -> None:
    class Fails(CountingEngine):
        def interrupt(self) -> list[Response]:
            raise RuntimeError("lost")

    thread = EngineThread(Fails())
    future = thread.submit([request(1, max_tokens=10**9)])[0]
    while not thread._unanswered:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="lost"):
        thread.interrupt()
    with pytest.raises(EngineError, match="lost"):
        future.result(10)
    thread.close()


def test_an_interrupt_that_forgets_a_request_is_reported() -> None:
    class Forgets(CountingEngine):
        def interrupt(self) -> list[Response]:
            self.running.clear()
            return []

    thread = EngineThread(Forgets())
    future = thread.submit([request(1, max_tokens=10**9)])[0]
    while not thread._unanswered:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="never answered"):
        thread.interrupt()
    with pytest.raises(EngineError, match="never answered"):
        future.result(10)
    thread.close()


def test_closing_ends_an_interrupt() -> None:
    engine = InterruptibleEngine()
    thread = EngineThread(engine)
    engine.may_step.clear()
    future = thread.submit([request(1, max_tokens=10**9)])[0]
    errors: list[str] = []

    def interrupt() -> None:
        try:
            thread.interrupt()
        except EngineError as error:
            errors.append(str(error))

    interrupting = run_in_thread(interrupt)
    closing = run_in_thread(thread.close)
    time.sleep(0.02)
    engine.may_step.set()
    interrupting.join(10)
    closing.join(10)
    assert not interrupting.is_alive() and future.done()


def test_the_seconds_of_steps_are_added_up() -> None:
    class Sleeps(CountingEngine):
        def step(self) -> list[Response]:
            time.sleep(0.01)
            return super().step()

    thread = EngineThread(Sleeps())
    assert thread.busy_seconds == 0.0
    thread.generate([request(1, max_tokens=5)])
    busy = thread.busy_seconds
    assert busy >= 0.05
    time.sleep(0.05)
    assert thread.busy_seconds == busy
    thread.close()
