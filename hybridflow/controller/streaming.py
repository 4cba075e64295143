"""Calls of many collects carried out together: what the handles of rollout and reward do while a stream runs.

Each collect calls `generate` and `score` as ever, on a few rows, and waits on its own thread. Here their rows go to the
engines in bulk, each call is answered when its rows are done, and the same for scores.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from hybridflow.batch import Batch
from hybridflow.errors import RequestRefusedError
from hybridflow.rollout.base import Sampling
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import Dispatcher
from hybridflow.workers.remote import Future as CallFuture
from hybridflow.workers.respond import COLUMNS_GENERATED, COLUMNS_SCORED, refusal, with_numbers, without_position
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import STARTED, RolloutWorker, nothing_said

W = TypeVar("W", bound=Worker)

CLOSING_TIMEOUT_S = 5.0
"""For the call that a thread may be in when the run ends."""
POLL_S = 0.1
"""The longest that ranks look out for finished rows in one call: other calls to them wait meanwhile."""
KEPT = (*STARTED, "loss_mask", "ended")
"""Columns of what a row has said so far."""


class StreamingDispatcher(Dispatcher):
    """Carries calls to the ranks, but for some methods, which are answered here."""

    is_streaming = True

    def __init__(self, inner: Dispatcher, answers: Mapping[str, Callable[..., CallFuture[object]]]):
        self.inner, self.answers = inner, answers

    @property
    def pool_name(self) -> str:
        return self.inner.pool_name

    @property
    def num_data_ranks(self) -> int:
        return self.inner.num_data_ranks

    def start(self, method: str, protocol: str, /, *args: object, **kwargs: object) -> CallFuture[object]:
        if method in self.answers:
            return self.answers[method](*args, **kwargs)
        return self.inner.start(method, protocol, *args, **kwargs)


def streaming_handle(handle: W, **answers: Callable[..., CallFuture[object]]) -> W:
    """A handle of the same class whose methods of these names are answered by these functions."""
    assert handle.dispatcher is not None, "a handle of a group"
    return type(handle).group(StreamingDispatcher(handle.dispatcher, answers))


@dataclass
class StreamedFuture:
    """The result of a call on a streaming handle."""

    future: Future[Batch] = field(default_factory=Future)

    def result(self, timeout_s: float | None = None) -> Batch:
        """Wait for the rows."""
        return self.future.result(timeout_s)

    def done(self) -> bool:
        """Whether the rows are there."""
        return self.future.done()

    @property
    def later(self) -> Batch:
        """Collects wait on threads of their own: the result itself."""
        return self.result()


@dataclass
class GenerateCall:
    """One call of `generate` by a collect."""

    group: int
    number: int
    """Of the calls for this group, from 0."""
    rows: Batch
    first: int
    """Position of its first row; the others follow."""
    sampling: Sampling | None
    answer: StreamedFuture = field(default_factory=StreamedFuture)
    parts: list[Batch] = field(default_factory=list)
    num_finished: int = 0


class OnThread:
    """Work of a thread of its own, from construction to `close`."""

    def __init__(self, name: str):
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; calls that wait get an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(CLOSING_TIMEOUT_S)  # a call through Ray that outlives Ray would abort the process

    def _run(self) -> None:
        raise NotImplementedError


class Generation(OnThread):
    """`generate` of many collects on one group of engines, by a thread that submits rows and takes what has finished."""

    def __init__(self, rollout: RolloutWorker, *, on_failure: Callable[[BaseException], None]):
        self.rollout, self.on_failure = rollout, on_failure
        self.begun: dict[tuple[int, int], Batch] = {}
        """What rows of (group, call) have said before a restart, with `place` and `ended`."""
        self._calls: dict[int, list[GenerateCall]] = defaultdict(list)
        """By group, until the stream forgets it."""
        self._waiting: list[GenerateCall] = []
        self._under_way: dict[int, GenerateCall] = {}
        """By position of each row."""
        self._num_rows = 0
        self._is_paused, self._is_busy = True, False
        super().__init__("hybridflow-generation")

    def generate(self, rows: Batch, *, sampling: Sampling | None = None) -> StreamedFuture:
        """What stands for `rollout.generate` on the streaming handle."""
        with self._changed:
            group = int(rows["group"][0])
            call = GenerateCall(group, len(self._calls[group]), rows, self._num_rows, sampling)
            self._num_rows += len(rows)
            self._calls[group].append(call)
            self._waiting.append(call)
            self._changed.notify_all()
        return call.answer

    def resume(self) -> None:
        """Generate: engines have the weights to generate with."""
        with self._changed:
            if not self._is_paused:
                return
            self._is_paused = False
            self._changed.notify_all()
        self.rollout.resume()

    def pause(self) -> None:
        """Stop between two steps of the engines. Rows keep what they have said."""
        with self._changed:
            self._is_paused = True
            self._changed.wait_for(lambda: not self._is_busy)
        self.rollout.interrupt()

    @property
    def is_paused(self) -> bool:
        """Whether engines are interrupted."""
        return self._is_paused

    def forget(self, group: int) -> None:
        """Drop what is known of a group that was learned from or refused."""
        with self._changed:
            self._calls.pop(group, None)

    def started(self) -> Batch | None:
        """While paused: everything that rows under way and finished rows of outstanding groups have said, with `group`, `call`,
        `place` (the row's number in its call) and `ended`; None where there is nothing."""
        assert self._is_paused, "what rows have said is read while they are interrupted"
        with self._changed:
            calls = [call for calls in self._calls.values() for call in calls]
        parts = list(self.begun.values())
        parts += [_as_started(call, part.with_columns(ended=1 + part["truncated"])) for call in calls for part in call.parts]
        unfinished = self.rollout.unfinished()
        for call in calls:
            own = np.flatnonzero(
                (unfinished["position"] >= call.first) & (unfinished["position"] < call.first + len(call.rows))
            )
            parts += [_as_started(call, unfinished.select(own))] if len(own) else []
        return Batch.concatenate(parts) if parts else None

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                for sampling, calls in self._grouped():
                    self.rollout.submit(self._rows(calls), sampling=sampling)
                if self._under_way:
                    self._hand_out(self.rollout.take_finished(1, POLL_S))
                with self._changed:
                    self._is_busy = False
                    self._changed.notify_all()
        except BaseException as error:
            self._fail(error)
            self.on_failure(error)
        else:
            self._fail(RuntimeError("the run has ended"))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (not self._is_paused and (self._waiting or self._under_way)))
            self._is_busy = not self._is_closed
            return not self._is_closed

    def _grouped(self) -> Iterable[tuple[Sampling | None, list[GenerateCall]]]:
        """Calls that wait, together where they sample alike."""
        with self._changed:
            waiting, self._waiting = self._waiting, []
        by_sampling: dict[Sampling | None, list[GenerateCall]] = defaultdict(list)
        for call in waiting:
            by_sampling[call.sampling].append(call)
            self._under_way |= dict.fromkeys(range(call.first, call.first + len(call.rows)), call)
        return by_sampling.items()

    def _rows(self, calls: Iterable[GenerateCall]) -> Batch:
        parts = []
        for call in calls:
            placed = call.rows.with_columns(
                position=np.arange(call.first, call.first + len(call.rows)), call=np.full(len(call.rows), call.number)
            )
            placed = with_numbers(placed, COLUMNS_GENERATED)
            begun = self.begun.pop((call.group, call.number), None)
            parts.append(placed if begun is None else placed.select(begun["place"]).join(with_numbers(begun, ("ended",))))
        if any("ended" in part for part in parts):
            names = next([name for name in KEPT if name in part and name != "ended"] for part in parts if "ended" in part)
            parts = [part if "ended" in part else part.join(nothing_said(len(part), names)) for part in parts]
        return Batch.concatenate(parts)

    def _hand_out(self, finished: Batch) -> None:
        if not len(finished):
            return
        calls = [self._under_way.pop(position) for position in finished["position"].tolist()]
        firsts = np.array([call.first for call in calls])
        for call in {call.first: call for call in calls}.values():
            part = finished.select(np.flatnonzero(firsts == call.first))
            if (found := refusal(part)) is not None and not call.answer.done():
                call.answer.future.set_exception(RequestRefusedError(found[1]))
            part = part.without(("refused",))
            call.parts.append(part)
            call.num_finished += len(part)
            if call.num_finished == len(call.rows) and not call.answer.done():
                whole = Batch.concatenate(call.parts)
                call.answer.future.set_result(without_position(whole.select(np.argsort(whole["position"]))))

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._is_busy, self._is_closed = False, True
            calls = [call for calls in self._calls.values() for call in calls]
            self._changed.notify_all()
        for call in calls:
            if not call.answer.done():
                call.answer.future.set_exception(error)


def _as_started(call: GenerateCall, part: Batch) -> Batch:
    """What rows of a call have said, by the names that a checkpoint and `submit` know."""
    said = with_numbers(part, ("ended",))
    names = [name for name in said.names if name not in KEPT]
    same = np.full(len(part), 0)
    return said.without(names).with_columns(
        group=same + call.group, call=same + call.number, place=part["position"] - call.first
    )


class Scoring(OnThread):
    """`score` of many collects: one call to the reward group at a time, for all rows that wait."""

    def __init__(self, reward: RewardWorker):
        self.reward = reward
        self._waiting: list[tuple[Batch, StreamedFuture]] = []
        super().__init__("hybridflow-scoring")

    def score(self, rows: Batch) -> StreamedFuture:
        """What stands for `reward.score` on the streaming handle."""
        answer = StreamedFuture()
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the run has ended")
            self._waiting.append((with_numbers(rows, COLUMNS_SCORED), answer))
            self._changed.notify_all()
        return answer

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or self._waiting)
                taken, self._waiting = self._waiting, []
                is_closed = self._is_closed
            if is_closed:
                for _, answer in taken:
                    answer.future.set_exception(RuntimeError("the run has ended"))
                return
            self._score(taken)

    def _score(self, taken: list[tuple[Batch, StreamedFuture]]) -> None:
        try:
            scores = self.reward.score(Batch.concatenate([rows for rows, _ in taken]))
        except BaseException as error:  # each collect raises it, and the stream with them
            for _, answer in taken:
                answer.future.set_exception(error)
            return
        first = 0
        for rows, answer in taken:
            answer.future.set_result(scores.select(np.arange(first, first + len(rows))))
            first += len(rows)
