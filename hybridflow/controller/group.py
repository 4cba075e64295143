"""Groups: a call of the controller goes to every rank of a pool, and its answers become one result."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray

from hybridflow import registry
from hybridflow.batch import ShardColumn
from hybridflow.controller.cost import CallLog, pickled_size
from hybridflow.controller.protocols import Arguments, Protocol
from hybridflow.controller.rank_process import RankAnswer
from hybridflow.controller.waiting import Job, Ranks, results_of
from hybridflow.errors import CallTimeoutError
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.trackers.timeline import Span
from hybridflow.workers.remote import CombinedFuture, Dispatcher

Reply = tuple["ray.ObjectRef[RankAnswer]", "ray.ObjectRef[dict[str, ShardColumn]]"]
ARGUMENTS_LATE_S = 120.0
"""Whoever waits for the arguments of a call is to say which call is late, and has longer than its limit for that."""


@dataclass(eq=False)
class Pool(Ranks):
    """The processes of one pool, one per rank, and the calls that wait to be sent to them."""

    queue: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "hybridflow-calls"))
    """Calls that wait for the results of others wait here; those behind them keep their order."""
    waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def end(self) -> None:
        """Kill the processes. Calls that wait are not sent any more."""
        self.queue.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            ray.kill(process)


@dataclass(frozen=True)
class StartedCall:
    """A call that is under way on every rank."""

    method: str
    replies: dict[int, Reply]
    """By rank; a protocol may leave ranks out."""
    protocol: Protocol


class GroupFuture:
    """The collected result of a call, when it has come."""

    def __init__(self, dispatcher: GroupDispatcher, call: StartedCall | ThreadFuture[StartedCall]):
        self._dispatcher, self._call = dispatcher, call
        self._lock = threading.Lock()
        self._result: list[object] = []

    def result(self, timeout_s: float | None = None) -> object:
        """Wait for the result.

        Raises:
            WorkerError: a rank failed; the first one to fail, however long the others take.
            WorkerDiedError: the process of a rank has ended.
            CallTimeoutError: a rank has not answered in time (`run.timeout_s` where `timeout_s` is None); with what it does.
        """
        with self._lock:
            if not self._result:
                self._result.append(self._dispatcher.collect(self._sent(timeout_s), timeout_s))
            return self._result[0]

    def _sent(self, timeout_s: float | None) -> StartedCall:
        if isinstance(self._call, StartedCall):
            return self._call
        limit_s = timeout_s if timeout_s is not None else self._dispatcher.timeout_s
        try:
            return self._call.result(limit_s + ARGUMENTS_LATE_S)
        except TimeoutError:
            waiting = f"a call of {self._dispatcher.role} still waits for its arguments after {limit_s:g} s"
            raise CallTimeoutError(f"{waiting}; they are results of calls that have not ended. Raise run.timeout_s?") from None

    def done(self) -> bool:
        """Whether every rank has answered."""
        if isinstance(self._call, ThreadFuture) and not self._call.done():
            return False
        call = self._call if isinstance(self._call, StartedCall) else self._call.result()
        answers = [answer for answer, _ in call.replies.values()]
        return len(ray.wait(answers, num_returns=len(answers), timeout=0, fetch_local=False)[0]) == len(answers)

    @property
    def later(self) -> object:
        """Stands for the result among the arguments of another call."""
        return self


class GroupDispatcher(Dispatcher):
    """Carries the calls of one role to the ranks of its pool."""

    def __init__(self, role: str, pool: Pool, layout: Layout, *, timeout_s: float, log: CallLog):
        self.role, self.pool, self.layout, self.timeout_s, self.log = role, pool, layout, timeout_s, log
        self.calls: list[Any] = [process.call.options(num_returns=2) for process in pool.processes]

    @property
    def pool_name(self) -> str:
        return self.pool.name

    @property
    def num_data_ranks(self) -> int:
        return self.layout.data

    def start(self, method: str, protocol: str, /, *args: object, **kwargs: object) -> GroupFuture:
        """Send the call to every rank and return at once.

        Calls to a pool run in the order in which they were started. One whose arguments are futures is sent when they
        have come; meanwhile calls to other pools go on.
        """
        arguments = Arguments(args, kwargs)
        has_futures = any(isinstance(value, GroupFuture | CombinedFuture) for value in (*args, *kwargs.values()))
        with self.pool.lock:
            if not has_futures and not self.pool.waiting:
                return GroupFuture(self, self._send(method, protocol, arguments))
            self.pool.waiting += 1
        return GroupFuture(self, self.pool.queue.submit(self._send_when_ready, method, protocol, arguments))

    def _send_when_ready(self, method: str, protocol: str, arguments: Arguments) -> StartedCall:
        try:
            return self._send(method, protocol, _resolved(arguments))
        finally:
            with self.pool.lock:
                self.pool.waiting -= 1

    def _send(self, method: str, protocol_name: str, arguments: Arguments) -> StartedCall:
        started = time.perf_counter()
        protocol_class = registry.load(protocol_name, registry.PROTOCOLS, key=f"@remote of {self.role}.{method}")
        assert isinstance(protocol_class, type) and issubclass(protocol_class, Protocol), f"{protocol_name} is not a Protocol"
        protocol = protocol_class(self.layout)
        per_rank = protocol.distribute(arguments)
        replies: dict[int, Reply] = {
            rank: send.remote((self.role, method, given.args, given.kwargs))
            for rank, (send, given) in enumerate(zip(self.calls, per_rank, strict=True))
            if given is not None
        }
        num_bytes = sum(_sizes(per_rank))
        self.log.sent(num_bytes, time.perf_counter() - started)
        return StartedCall(method, replies, protocol)

    def collect(self, call: StartedCall, timeout_s: float | None) -> object:
        """Wait for all ranks of a call and make their answers one result."""
        jobs = {answer: Job(self.pool, rank, self.role, call.method) for rank, (answer, _) in call.replies.items()}
        found = results_of(jobs, timeout_s if timeout_s is not None else self.timeout_s)
        answers: dict[int, RankAnswer] = dict(zip(call.replies, found, strict=True))
        started = time.perf_counter()
        results: list[object] = [None] * self.layout.num_ranks
        for rank, answer in answers.items():
            results[rank] = answer.with_shard(call.replies[rank][1]) if rank in call.protocol.answering else answer.value
        collected = call.protocol.collect(results)
        num_bytes = sum(answer.num_bytes for answer in answers.values())
        slowest = max(answers.values(), key=lambda answer: answer.seconds)
        span = Span(self.pool.name, f"{self.role}.{call.method}", slowest.began, slowest.seconds)
        for answer in answers.values():
            if answer.memory:
                self.log.used(allocated_gib=answer.memory.allocated_gib, reserved_gib=answer.memory.reserved_gib)
        reported = [answers[rank].reported for rank in call.protocol.answering if rank in answers]
        self.log.answered(span, num_bytes, time.perf_counter() - started)
        self.log.reported(Metrics.merged(reported))
        return collected


def _resolved(arguments: Arguments) -> Arguments:
    """The arguments with the results of futures in their places."""

    def value_of(value: object) -> object:
        return value.result() if isinstance(value, GroupFuture | CombinedFuture) else value

    return Arguments(tuple(map(value_of, arguments.args)), {name: value_of(value) for name, value in arguments.kwargs.items()})


def _sizes(per_rank: Sequence[Arguments | None]) -> list[int]:
    """Bytes sent to each rank; ranks with the very same arguments are measured once."""
    sizes: dict[int, int] = {id(None): 0}
    for given in per_rank:
        if given is not None and id(given) not in sizes:
            sizes[id(given)] = pickled_size((*given.args, *given.kwargs.items()))
    return [sizes[id(given)] for given in per_rank]
