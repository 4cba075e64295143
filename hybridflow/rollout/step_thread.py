"""The thread that steps an engine, so that requests can be added while it runs.

Whole batches and the turns of an episode take one path: `submit`, which returns a future for each request.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count

from hybridflow.errors import EngineError, RequestRefusedError
from hybridflow.rollout.base import Engine, Request, Response

GAP_S, MAX_GATHERING_S = 0.003, 0.1
"""Turns of many episodes end in one step, and the next ones come back one by one, within less than the first. Started one by
one, each would have a step of its own: of 64 episodes with two turns a third of all steps (benchmarks/turns.py)."""
Submitted = list[tuple[Request, Future[Response]]]


@dataclass(frozen=True)
class Decision:
    """What happens before a step. Ranks that share an engine must do the same before the same step, or they wait for each other
    for ever; numbers are counted from the start, since what one rank knows already another may learn later."""

    num_submissions: int
    """Those that the engine has been given then; where an interrupt comes, those that it stops."""
    num_interrupts: int
    is_closing: bool
    num_pauses: int = 0
    """Those that have begun: the engine is idle, and belongs to whoever asked for them."""
    fresh: Sequence[Sequence[Request]] = ()
    """The submissions among them that this rank has not been given before, for ranks that have none of their own."""
    num_handed_out: int = 0
    """How many calls of `handing_out` have ended on the first rank, for ranks that follow."""


Agree = Callable[[Decision], Decision]
"""Given what this rank would do, says what all do. Every rank of an engine calls it before the same step."""


class EngineThread:
    """Owns an engine. Every request that was submitted ends in a response or an error, whatever happens to the thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        agree: Agree | None = None,
        leads: bool = False,
        is_followed: bool = False,
        follows: bool = False,
    ):
        """`agree` is for ranks that share an engine (rollout/lockstep.py), one of which `leads`. One that `follows` is given no
        requests by its own process, but steps its part of the engine with those of the first rank, which `is_followed`."""
        self._engine, self._agree, self._leads, self._follows = engine, agree, leads, follows
        self._is_followed = is_followed
        self._ids = count()
        self._changed = threading.Condition()
        self._submitted: deque[Submitted] = deque()
        self._held_back: deque[Submitted] = deque()
        """What was submitted after a pause was asked for."""
        self._unanswered: dict[int, tuple[int, Future[Response]]] = {}
        self._failure: BaseException | None = None
        self._num_pauses_asked, self._num_pauses_begun, self._num_pauses_ended = 0, 0, 0
        self._num_taken = 0
        """Submissions that the engine has been given, or that an interrupt has stopped before."""
        self._num_interrupts_asked = 0
        self._num_interrupts = 0
        """Those carried out."""
        self._num_handed_out, self._num_told, self._num_asked_for = 0, 0, 0
        self._busy_seconds = 0.0
        self._is_closed, self._has_ended = False, False
        self._thread = threading.Thread(target=self._run, name="hybridflow-engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> list[Future[Response]]:
        """Queue requests, which start together; a future for each, in their order. `id` is the caller's to choose.

        Example:
            short, long = thread.submit([Request(id=0, ...), Request(id=1, ...)])
            short.result().finish_reason  # 'stop', while the other goes on
            thread.interrupt()
            long.result().finish_reason, len(long.result().tokens)  # ('interrupted', 412)

        Raises:
            EngineError: the engine failed before, or was closed.
        """
        futures: list[Future[Response]] = [Future() for _ in requests]
        with self._changed:
            self.raise_failure()
            (self._held_back if self._is_paused else self._submitted).append(list(zip(requests, futures, strict=True)))
            self._changed.notify_all()
        return futures

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """The responses, in the order of the requests.

        Raises:
            EngineError: of the first request that has no response.
        """
        return [future.result() for future in self.submit(requests)]

    def interrupt(self) -> None:
        """Stop all requests that were submitted and are unfinished, and wait until the engine is idle.

        The future of each gets what there is of its response, possibly no token, with the finish reason "interrupted". What is
        submitted later runs as always.

        Raises:
            EngineError: the engine failed, before or now, or was closed.
        """
        with self._changed:
            self.raise_failure()
            self._submitted.extend(self._held_back)  # they will be answered, not run
            self._held_back.clear()
            self._num_interrupts_asked += 1
            number = self._num_interrupts_asked
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._num_interrupts >= number or self._failure is not None or self._is_closed)
            if self._num_interrupts < number:
                self.raise_failure()

    @contextmanager
    def handing_out(self) -> Iterator[None]:
        """A call in which rows are taken from the first rank, made on every rank: one that follows leaves it when the first
        does, whether or not that has failed.

        Raises:
            EngineError: this part of the engine, on a rank that follows, has failed, before or meanwhile.
        """
        with self._changed:
            self._num_asked_for += 1
            number = self._num_asked_for
        try:
            yield
        finally:
            with self._changed:
                self._num_handed_out += self._is_followed
                self._changed.notify_all()
        if self._follows:
            with self._changed:
                self._changed.wait_for(lambda: self._num_told >= number or self._has_ended)
                self.raise_failure()

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has spent in steps since the start."""
        return self._busy_seconds

    @contextmanager
    def paused(self) -> Iterator[Engine]:
        """The engine, idle and for the caller alone: to load weights or change its memory.

        What was submitted before is answered first, what is submitted later waits.
        """
        with self._changed:
            self._num_pauses_asked += 1
            number = self._num_pauses_asked
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._num_pauses_begun >= number or self._failure is not None or self._is_closed)
                self.raise_failure()
                yield self._engine
            finally:
                self._num_pauses_ended += 1
                if not self._is_paused:
                    self._submitted.extend(self._held_back)
                    self._held_back.clear()
                self._changed.notify_all()

    def close(self) -> None:
        """End the thread and the engine; unanswered requests get an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._engine.close()

    @property
    def _is_pause_over(self) -> bool:
        return self._num_pauses_ended >= self._num_pauses_begun

    @property
    def _is_paused(self) -> bool:
        return self._num_pauses_asked > self._num_pauses_ended

    def raise_failure(self) -> None:
        """Raise EngineError where the engine has failed or was closed."""
        if self._failure is not None:
            raise EngineError(f"the generation engine failed before: {self._failure}") from self._failure
        if self._is_closed:
            raise EngineError("the generation engine was closed")

    def _run(self) -> None:
        import torch  # here, since the controller knows this class too and needs no torch

        if self._engine.spec.device.type == "cuda":
            torch.cuda.set_device(self._engine.spec.device)  # the current device belongs to a thread
        # So does OpenMP's number of threads, which a new thread takes from OMP_NUM_THREADS until torch, at its first call,
        # hands it that of the process; vLLM's kernels on the CPU plan with the one and run with the other.
        torch.get_num_threads()
        try:
            while not (decision := self._next_decision()).is_closing:
                self._carry_out(decision)
                if self._unanswered:  # none where all that was submitted was refused
                    start = time.monotonic()
                    responses = self._engine.step()
                    self._busy_seconds += time.monotonic() - start
                    self._answer(responses)
        except BaseException as error:  # it reaches whoever waits for a response, and whoever submits later
            self._end(error)
            self._tell_followers()
        else:
            self._end(None)

    def _next_decision(self) -> Decision:
        """Wait until there is something to do, and say what; with the other ranks, where there are any.

        A rank asks the others only where it has something to do itself. All are told the same by their callers, so what the
        first one decides, the others have or will have. One that follows waits for the first alone.
        """
        with self._changed:
            if not self._follows:
                self._changed.wait_for(self._has_work)
                self._gather()
            known = self._num_taken + len(self._submitted)
            is_idle = not (self._unanswered or self._submitted)
            num_pauses = self._num_pauses_asked if is_idle else self._num_pauses_begun
            fresh = [[request for request, _ in submission] for submission in self._submitted] if self._agree else ()
            num_interrupts = max(self._num_interrupts_asked, self._num_interrupts)
            decision = Decision(known, num_interrupts, self._is_closed, num_pauses, fresh, self._num_handed_out)
        decision = decision if self._agree is None else self._agree(decision)
        if self._follows:
            self._submitted += [[(request, Future()) for request in submission] for submission in decision.fresh]
        return decision

    def _has_work(self) -> bool:
        is_asked = self._num_interrupts_asked > self._num_interrupts or self._num_pauses_asked > self._num_pauses_begun
        is_asked = is_asked or self._num_handed_out > self._num_told
        return bool(is_asked or self._is_closed or self._unanswered or self._submitted)

    def _gather(self) -> None:
        """Where what was submitted is no less than what runs, wait for more as long as more comes."""
        ends = time.monotonic() + MAX_GATHERING_S
        while (known := sum(map(len, self._submitted))) and known >= len(self._unanswered):
            is_needed = self._is_closed or self._num_interrupts_asked > self._num_interrupts or self._is_paused
            num_calls, seconds = len(self._submitted), min(GAP_S, ends - time.monotonic())
            if is_needed or seconds <= 0 or not self._changed.wait_for(lambda n=num_calls: len(self._submitted) > n, seconds):  # type: ignore[misc]
                return

    def _carry_out(self, decision: Decision) -> None:
        """Hand over what was submitted; or, in an interrupt, answer all that is unfinished with what there is."""
        is_interrupt = decision.num_interrupts > self._num_interrupts
        if is_interrupt and self._unanswered:  # an idle engine belongs to whoever paused it
            self._answer(self._engine.interrupt())
        with self._changed:
            while self._num_taken < decision.num_submissions:
                # What comes behind a pause of the first rank may come while this rank's goes on.
                self._changed.wait_for(lambda: self._is_closed or (self._submitted and (is_interrupt or self._is_pause_over)))
                if not self._submitted:  # closed
                    return
                for request, future in self._submitted[0]:
                    if is_interrupt:
                        future.set_result(Response.without_tokens(request))
                    else:
                        self._admit(request, future)
                self._submitted.popleft()
                self._num_taken += 1
                self._changed.notify_all()
            self._num_interrupts, self._num_pauses_begun = decision.num_interrupts, decision.num_pauses
            self._num_told = decision.num_handed_out
            self._changed.notify_all()

    def _admit(self, request: Request, future: Future[Response]) -> None:
        """Give the engine one request; one that it refuses fails alone."""
        number = next(self._ids)  # the ids of several callers may collide: here each request has its own
        self._unanswered[number] = request.id, future
        try:
            self._engine.check_length(request)  # the engine checks too, but would name its own number
            self._engine.add(replace(request, id=number))
        except EngineError as error:
            del self._unanswered[number]
            future.set_exception(RequestRefusedError(str(error)))

    def _answer(self, responses: Sequence[Response]) -> None:
        with self._changed:
            for response in responses:
                callers_id, future = self._unanswered.pop(response.id)
                future.set_result(replace(response, id=callers_id))
            if self._unanswered and not self._engine.num_unfinished:
                raise EngineError(f"the engine is idle, but {len(self._unanswered)} requests were never answered")
            self._changed.notify_all()

    def _tell_followers(self) -> None:
        """After a failure: ranks that follow wait for the next decision, and cannot be closed before it has come."""
        if self._agree is not None and self._leads:
            with suppress(Exception):  # the failure may be that of agreeing
                self._agree(Decision(self._num_taken, self._num_interrupts, is_closing=True, num_pauses=self._num_pauses_begun))

    def _end(self, error: BaseException | None) -> None:
        """Tell everyone who waits that no response will come."""
        why = "was closed" if error is None else f"failed: {type(error).__name__}: {error}"
        with self._changed:
            self._failure, self._has_ended = error, True
            waiting = [future for _, future in self._unanswered.values()]
            waiting += [future for requests in (*self._submitted, *self._held_back) for _, future in requests]
            for future in waiting:
                if not future.done():
                    failure = EngineError(f"the generation engine {why}")
                    failure.__cause__ = error
                    future.set_exception(failure)
            self._unanswered.clear()
            self._submitted.clear()
            self._held_back.clear()
            self._changed.notify_all()
