"""The stream of prompt groups: how far generation runs ahead of training, and which groups a step learns from.

A group is one prompt with its scored responses. With S = `loop.max_staleness` and P prompts per step, a group is admitted only
while fewer than (S + 1) P are outstanding, and is learned from at most S steps after the one that admitted it. A step takes
groups in the order in which they complete, as long as the older ones can still be taken in time: nothing is older than S,
nothing is thrown away, and long responses are neither starved nor favoured.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from hybridflow import interrupts
from hybridflow.batch import Batch
from hybridflow.controller.waiting import SECONDS_OF_SILENCE, thread_line
from hybridflow.errors import CallTimeoutError

logger = logging.getLogger("hybridflow")

Draw = Callable[[int, int], Batch]
"""`draw(step, count)`: the next prompts, one row each."""
Collect = Callable[[Batch], Batch]
Keep = Callable[[Batch], bool]


@dataclass(frozen=True)
class Group:
    """One prompt, from its admission to the step that learns from it."""

    number: int
    """Counts up over the run; column `group` of its rows."""
    step: int
    """That admitted it: its oldest token was sampled by the policy of that step or a later one."""
    prompts: Batch
    """One row."""


@dataclass(frozen=True)
class Taken:
    """What a step learns from."""

    rows: Batch
    num_refused: int
    num_outstanding: int
    """Groups that stay under way."""
    seconds_waiting: float


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """Of a run."""

    prompts_per_step: int
    max_staleness: int
    total_steps: int
    timeout_s: float = math.inf
    """Within which one of the groups under way is to be completed."""


@dataclass
class Stream:
    """Runs `collect` for many groups at a time, each on a thread of its own. One thread calls `take`.

    Example: with `Stream(settings, draw, collect, keep)`, `stream.take(1).rows` has the rows of P prompts, while up to S P
    more are under way.
    """

    settings: StreamSettings
    draw: Draw
    collect: Collect
    keep: Keep
    forget: Callable[[int], None] = lambda number: None
    """Called with the number of a group that nobody needs any more."""
    all_stacks: Callable[[], str] = lambda: ""
    """What all ranks do, for people."""
    outstanding: dict[int, Group] = field(default_factory=dict)
    """Admitted, and neither learned from nor refused."""
    num_admitted: int = 0
    returned: list[Batch] = field(default_factory=list)
    """Prompts that were admitted before a restart and begin anew, before others are drawn."""

    def __post_init__(self) -> None:
        self._done = threading.Condition()
        self._complete: dict[int, Batch] = {}
        """By number, in the order of completion."""
        self._threads: dict[int, threading.Thread] = {}
        self._failure: BaseException | None = None

    @property
    def capacity(self) -> int:
        """Most groups that are outstanding at any time."""
        return (self.settings.max_staleness + 1) * self.settings.prompts_per_step

    def take(self, step: int) -> Taken:
        """The rows of P groups that `keep` has kept, those that completed first first. Steps are asked for in order.

        Raises:
            Exception: what `draw`, `collect` or `keep` raised; the stream has failed for good then.
        """
        if self.settings.max_staleness == 0:
            return self._take_now(step)
        started, num_refused = time.perf_counter(), 0
        chosen: list[Batch] = []
        self._admit(step, len(chosen))
        while len(chosen) < self.settings.prompts_per_step:
            number, rows = self._next(step, num_left=self.settings.prompts_per_step - len(chosen))
            del self.outstanding[number]
            self.forget(number)
            if self.keep(rows):
                chosen.append(rows)
            else:
                num_refused += 1
                self._admit(step, len(chosen))
        waited = time.perf_counter() - started
        return Taken(Batch.concatenate(chosen), num_refused, len(self.outstanding), waited)

    def _take_now(self, step: int) -> Taken:
        """All prompts of the step at once, and more where some were refused."""
        started, wanted = time.perf_counter(), self.settings.prompts_per_step
        parts: list[Batch] = []
        num_kept = num_refused = 0
        while num_kept < wanted:
            rows = self.collect(self._prompts(step, wanted - num_kept, first=num_kept + num_refused))
            numbers = rows["group"]
            distinct = np.unique(numbers)
            kept = [number for number in distinct if self.keep(rows.select(np.flatnonzero(numbers == number)))]
            num_refused += len(distinct) - len(kept)
            num_kept += len(kept)
            if kept:
                parts.append(rows if len(kept) == len(distinct) else rows.select(np.flatnonzero(np.isin(numbers, kept))))
        rows = parts[0] if len(parts) == 1 else Batch.concatenate(parts)
        return Taken(rows, num_refused, 0, time.perf_counter() - started)

    def _prompts(self, step: int, count: int, *, first: int) -> Batch:
        """The next prompts: those that a restart has returned, then others. Their groups are numbered from `first`."""
        again, self.returned = self.returned[:count], self.returned[count:]
        parts = [*again, *([self.draw(step, count - len(again))] if len(again) < count else [])]
        prompts = parts[0] if len(parts) == 1 else Batch.concatenate(parts)
        return prompts.with_columns(group=np.arange(first, first + count).repeat(len(prompts) // count))

    def _admit(self, step: int, num_chosen: int) -> None:
        """Fill up to what may be outstanding, and to what the rest of the run will learn from."""
        settings = self.settings
        wanted = (settings.total_steps - step + 1) * settings.prompts_per_step
        count = min(self.capacity, wanted) - len(self.outstanding) - num_chosen
        if count <= 0:
            return
        prompts = self._prompts(step, count, first=self.num_admitted)
        for row in range(count):
            self.admit(Group(self.num_admitted, step, prompts.select([row])))

    def admit(self, group: Group) -> None:
        """Begin to collect a group."""
        self.num_admitted = max(self.num_admitted, group.number + 1)
        self.outstanding[group.number] = group
        thread = threading.Thread(target=self._collect, args=(group,), name="hybridflow-collect", daemon=True)  # may never end
        with self._done:
            self._threads[group.number] = thread
        thread.start()

    def _collect(self, group: Group) -> None:
        try:
            rows = self.collect(group.prompts)
        except BaseException as error:  # whatever it is, `take` raises it
            self.fail(error)
            return
        with self._done:
            del self._threads[group.number]
            self._complete[group.number] = rows
            self._done.notify_all()

    def _next(self, step: int, *, num_left: int) -> tuple[int, Batch]:
        """Wait for the first complete group that this step may take, where it takes `num_left` more."""
        started = said = since = time.monotonic()
        num_complete = -1
        with self._done:
            while True:
                if self._failure is not None:
                    raise self._failure
                interrupts.raise_if_lost()
                for number, rows in self._complete.items():
                    if self._may_take(number, step, num_left):
                        del self._complete[number]
                        return number, rows
                self._done.wait(1.0)
                now = time.monotonic()
                num_complete, since = len(self._complete), since if num_complete == len(self._complete) else now
                if now - since >= self.settings.timeout_s:
                    raise self._overdue(self._waiting_for(step, num_left))
                if now - said > SECONDS_OF_SILENCE:
                    said = now
                    logger.info("%s, after %.0f s", self._waiting_for(step, num_left), now - started)

    def _waiting_for(self, step: int, num_left: int) -> str:
        oldest, thread = min(self._threads.items(), default=(-1, threading.current_thread()))
        under_way = f"{len(self._threads)} are under way, group {oldest} the oldest, in {thread_line(thread.ident)}"
        return f"step {step} waits for {num_left} more prompts; {under_way}"

    def _overdue(self, waiting: str) -> CallTimeoutError:
        error = CallTimeoutError(f"{waiting}; none was completed within run.timeout_s={self.settings.timeout_s:g} s")
        error.add_note(f"What every rank was doing:\n{self.all_stacks()}")
        return error

    def _may_take(self, number: int, step: int, num_left: int) -> bool:
        """Whether all other groups can still be taken in time: for each later step, those that are due by then must fit into
        what this step and the ones up to that one have left."""
        settings = self.settings
        due = np.array(
            [group.step + settings.max_staleness - step for other, group in self.outstanding.items() if other != number]
        )
        room = num_left - 1 + settings.prompts_per_step * np.arange(settings.max_staleness + 1)
        return all((due <= ahead).sum() <= left for ahead, left in enumerate(room))

    def fail(self, error: BaseException) -> None:
        """Have `take` raise this error, now or when it is called next."""
        with self._done:
            self._failure = self._failure or error
            self._done.notify_all()

    def state_dict(self) -> dict[str, object]:
        """Numbers of the stream and of its outstanding groups; prompts and responses are kept elsewhere."""
        groups = list(self.outstanding.values())
        return {
            "max_staleness": self.settings.max_staleness,
            "num_admitted": self.num_admitted,
            "groups": [group.number for group in groups],
            "steps": [group.step for group in groups],
        }

    def load_state_dict(self, state: Mapping[str, object], prompts: Sequence[Batch]) -> bool:
        """Take back the groups that were outstanding, with the prompt of each; whether they go on from what they had.

        They begin anew where other groups may be outstanding than before: what they had may be too old.
        """
        numbers, steps = state["groups"], state["steps"]
        assert isinstance(numbers, list) and isinstance(steps, list)
        self.num_admitted = int(str(state["num_admitted"]))
        if state["max_staleness"] != self.settings.max_staleness:
            self.returned = list(prompts)
            return False
        for number, step, prompt in zip(numbers, steps, prompts, strict=True):
            self.admit(Group(number, step, prompt))
        return True
