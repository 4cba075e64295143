"""The processes beside an engine in which its episodes live, and the thread on which everything about episodes happens.

A method that does not return costs its own episode and no other: the process that it hangs in gets no new episodes, and ends
when the others in it have ended. Where a whole process ends or falls silent, the episodes whose method ran fail, and those that
wait for the policy are told that they were lost.
"""

from __future__ import annotations

import logging
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from hybridflow.config.schema import EnvironmentConfig
from hybridflow.environments.base import Message, Opening, Outcome, Row
from hybridflow.environments.child import Alive, Ask, Loaded, MethodAnswer, MethodFailure, NotLoaded
from hybridflow.errors import EpisodeError
from hybridflow.guardian import LOAD_TIMEOUT_S, end_process, start_guarded

logger = logging.getLogger("hybridflow")

SILENCE_S = 10.0
"""Beyond the time limit of a method, after which a process that says nothing is ended."""
CHECK_EVERY_S = 0.5

Result = Opening | Outcome | MethodFailure
Job = Callable[[], None]


@dataclass(eq=False)
class _Child:
    """One process."""

    process: subprocess.Popen[bytes]
    connection: Connection
    heard_at: float
    outbox: queue.SimpleQueue[object] = field(default_factory=queue.SimpleQueue)
    """Sent by a thread of its own: a process that hangs may not read."""
    is_ready: bool = False
    is_stuck: bool = False
    episodes: set[int] = field(default_factory=set)


@dataclass
class _Live:
    """One episode."""

    child: _Child
    on_lost: Job
    on_answer: Callable[[Result], None] | None = None
    """While a method runs."""


class EnvironmentProcesses:
    """`environment.num_processes` processes, which have loaded the user's class when the constructor returns.

    `begin`, `step` and `end` are for jobs of `post`, as which answers come too: one thread does all of it.

    Raises:
        EpisodeError: the class cannot be loaded.
    """

    def __init__(self, config: EnvironmentConfig):
        self.config = config
        self._numbers = count()
        self._live: dict[int, _Live] = {}
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """What is wrong with the class, or None, of each of the first processes."""
        self._checked_at = time.monotonic()
        self._is_closed = False
        self._children = [self._spawn() for _ in range(config.num_processes)]
        self._thread = threading.Thread(target=self._run, name="hybridflow-episodes", daemon=True)
        self._thread.start()
        self._wait_until_loaded()

    def _wait_until_loaded(self) -> None:
        for _ in range(self.config.num_processes):
            try:
                problem = self._loaded.get(timeout=LOAD_TIMEOUT_S)
            except queue.Empty:
                problem = f"the environment was not loaded within {LOAD_TIMEOUT_S:.0f} s"
            if problem is not None:
                self.close()
                raise EpisodeError(problem)

    def post(self, job: Job) -> None:
        """Have a job done on the thread of episodes."""
        self._jobs.put(job)

    def begin(self, row: Row, on_answer: Callable[[Result], None], on_lost: Job) -> int:
        """Begin an episode with `reset(row)`; the number by which it is known here. `on_lost` is called where its process ends
        while it waits."""
        while sum(not child.is_stuck for child in self._children) < self.config.num_processes:
            self._children.append(self._spawn())
        child = min((child for child in self._children if not child.is_stuck), key=lambda child: len(child.episodes))
        number = next(self._numbers)
        child.episodes.add(number)
        self._live[number] = _Live(child, on_lost, on_answer)
        child.outbox.put(Ask(number, "reset", row))
        return number

    def step(self, number: int, message: Message, on_answer: Callable[[Result], None]) -> None:
        """Call `step(message)`."""
        live = self._live[number]
        live.on_answer = on_answer
        live.child.outbox.put(Ask(number, "step", message))

    def end(self, number: int) -> None:
        """Call `close`, where there is one, and forget the episode."""
        if (live := self._live.pop(number, None)) is not None:
            live.child.outbox.put(Ask(number, "close", None))
            live.child.episodes.discard(number)
            self._retire(live.child)

    def close(self) -> None:
        """End the thread and the processes."""
        self._is_closed = True
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for child in list(self._children):
            child.process.terminate()
            self._end_process(child)

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=CHECK_EVERY_S)
            except queue.Empty:
                job = self._end_silent
            if job is None:
                return
            job()
            if time.monotonic() - self._checked_at > CHECK_EVERY_S:
                self._end_silent()

    def _hear(self, child: _Child, message: object) -> None:
        match message:
            case Loaded():
                child.is_ready = True
                self._loaded.put(None)
            case NotLoaded(problem):
                self._loaded.put(problem)
            case MethodAnswer(number, result, is_stuck):
                child.is_stuck |= is_stuck
                live = self._live.get(number)
                if live is not None and live.on_answer is not None:
                    on_answer, live.on_answer = live.on_answer, None
                    on_answer(result)
            case Alive():
                pass

    def _lose(self, child: _Child, cause: str = "") -> None:
        """A process has ended, or is ended since it says nothing, or what nobody understands (`cause`)."""
        if self._is_closed or child not in self._children:
            return
        was_silent = child.is_ready and time.monotonic() - child.heard_at > self.config.timeout_s
        exit_code = self._end_process(child)
        end = f"ended with exit code {exit_code}{cause}"
        if not child.is_ready:
            self._loaded.put(f"the process {end} while it loaded the environment")
        silent = f"its process said nothing for {self.config.timeout_s + SILENCE_S:g} s"
        failure = MethodFailure("timed out", silent) if was_silent else MethodFailure("died", f"its process {end}")
        for live in [self._live.pop(number) for number in sorted(child.episodes)]:
            if live.on_answer is not None:
                live.on_answer(failure)
            else:
                live.on_lost()

    def _end_silent(self) -> None:
        now, before = time.monotonic(), self._checked_at
        self._checked_at = now
        for child in list(self._children):
            if now - before > 10 * CHECK_EVERY_S:  # it is this process that stood still
                child.heard_at = now
            allowed = self.config.timeout_s + SILENCE_S if child.is_ready else LOAD_TIMEOUT_S
            if now - child.heard_at > allowed:
                self._lose(child)

    def _retire(self, child: _Child) -> None:
        """End a process that hangs somewhere, once nothing else lives in it."""
        if child.is_stuck and not child.episodes and child in self._children:
            self._end_process(child)

    def _end_process(self, child: _Child) -> int:
        """Its exit code."""
        self._children.remove(child)
        child.outbox.put(None)
        return end_process(child.process)

    def _spawn(self) -> _Child:
        ours, theirs = Pipe()
        process = start_guarded("hybridflow.environments.child", theirs)
        child = _Child(process, ours, heard_at=time.monotonic())
        child.outbox.put(self.config)
        for task in (self._read, self._write):
            threading.Thread(target=task, args=(child,), daemon=True).start()
        return child

    def _read(self, child: _Child) -> None:
        try:
            while True:
                message = child.connection.recv()
                child.heard_at = time.monotonic()
                self.post(partial(self._hear, child, message))
        except (EOFError, OSError):
            self.post(partial(self._lose, child))
        except Exception as error:  # the user's code can write to the socket too, and bytes that are no message raise anything
            self.post(partial(self._lose, child, f", since its socket gave no message: {type(error).__name__}: {error!s:.200}"))

    def _write(self, child: _Child) -> None:
        try:
            while (message := child.outbox.get()) is not None:
                child.connection.send(message)
        except OSError:  # it has ended, and the reader says so
            return
