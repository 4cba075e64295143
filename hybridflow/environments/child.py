"""The process in which episodes live: many at once, each an object of the user's class.

`processes.py` starts it with the number of a socket as the first argument. Methods that are `async` share one event loop, plain
ones run on threads. Imports no torch.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, cast

from hybridflow.config.schema import EnvironmentConfig
from hybridflow.environments.base import Message, Opening, Outcome, Row, load_environment, opening_of, outcome_of
from hybridflow.environments.threads import on_thread
from hybridflow.errors import HybridflowError
from hybridflow.guardian import end_with_parent, shortened

MAX_THREADS = 64
"""Plain methods that run at once; others wait, and their time has not begun."""
ALIVE_EVERY_S = 1.0
"""The event loop says so: one that a method blocks falls silent."""


@dataclass(frozen=True)
class Ask:
    """Call a method for an episode."""

    episode: int
    method: Literal["reset", "step", "close"]
    given: Row | Message | None


@dataclass(frozen=True)
class MethodFailure:
    """An episode that cannot go on."""

    reason: Literal["raised", "timed out", "died"]
    detail: str
    """Traceback, or what happened to the process."""


@dataclass(frozen=True)
class MethodAnswer:
    """What a method of an episode has given."""

    episode: int
    result: Opening | Outcome | MethodFailure
    is_stuck: bool = False
    """A thread was left behind in it: the process ends when its other episodes have ended."""


@dataclass(frozen=True)
class Loaded:
    """The class is loaded."""


@dataclass(frozen=True)
class Alive:
    """The event loop turns."""


@dataclass(frozen=True)
class NotLoaded:
    """No episode can begin: a mistake of the configuration."""

    problem: str


class MethodTimeoutError(Exception):
    """A method has not returned in time."""

    def __init__(self, is_stuck: bool):
        super().__init__(is_stuck)
        self.is_stuck = is_stuck
        """Whether its thread was left behind."""


class Episodes:
    """The episodes of this process."""

    def __init__(self, connection: Connection, config: EnvironmentConfig, make: Callable[[], object]):
        self.connection, self.config, self.make = connection, config, make
        self.own = os.getpid()
        self.environments: dict[int, object] = {}
        self.threads = asyncio.Semaphore(MAX_THREADS)
        self.tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer until the other end closes the socket."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def read() -> None:
            try:
                while True:
                    ask = self.connection.recv()
                    loop.call_soon_threadsafe(self.begin, ask)
            except (EOFError, OSError):
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=read, daemon=True).start()
        while not ended.is_set():
            self.connection.send(Alive())
            try:
                await asyncio.wait_for(ended.wait(), ALIVE_EVERY_S)
            except TimeoutError:
                continue

    def begin(self, ask: Ask) -> None:
        """Have an ask answered when its method has ended."""
        task = asyncio.get_running_loop().create_task(self.answer(ask))
        self.tasks.add(task)  # the loop keeps none alive
        task.add_done_callback(self.tasks.discard)

    async def answer(self, ask: Ask) -> None:
        """Call the method and say what came of it."""
        is_stuck = False
        result: Opening | Outcome | MethodFailure
        try:
            result = await self.call(ask)
        except MethodTimeoutError as late:
            is_stuck = late.is_stuck
            allowed = f"environment.timeout_s={self.config.timeout_s:g}"
            result = MethodFailure("timed out", f"{ask.method} has not returned within {allowed}")
        except (Exception, SystemExit, KeyboardInterrupt, asyncio.CancelledError):
            result = MethodFailure("raised", shortened(traceback.format_exc()))
        if os.getpid() != self.own:  # a method that forks returns twice: what the copy says is nobody's answer
            os._exit(0)
        if ask.method == "close":
            return
        with suppress(ConnectionError):  # where nobody is at the other end any more, the reader ends this process
            self.connection.send(MethodAnswer(ask.episode, result, is_stuck))  # all of it is plain: base.py sees to that

    async def call(self, ask: Ask) -> Opening | Outcome:
        """The checked result of a method."""
        if ask.method == "reset":
            self.environments[ask.episode] = await self.limited(self.make)
        environment = self.environments[ask.episode]
        if ask.method == "close":
            del self.environments[ask.episode]
            if callable(close := getattr(environment, "close", None)):
                await self.limited(close)
            return Outcome((), 0.0, True, False)
        method = cast(Callable[..., object], getattr(environment, ask.method))
        result = await self.limited(method, ask.given)
        return opening_of(result) if ask.method == "reset" else outcome_of(result)

    async def limited(self, method: Callable[..., object], *given: object) -> object:
        """What a method returns within the time limit; a plain one on a thread, which is left behind."""
        if inspect.iscoroutinefunction(method):
            return await self.within(method(*given), is_thread=False)
        async with self.threads:
            result = await self.within(on_thread(method, *given), is_thread=True)
        return await self.within(result, is_thread=False) if inspect.isawaitable(result) else result

    async def within(self, awaitable: Awaitable[object], *, is_thread: bool) -> object:
        """The result of an awaitable within the time limit. `asyncio.wait_for` would not tell its limit from those of the
        user's own."""
        task = asyncio.ensure_future(awaitable)
        done, _ = await asyncio.wait({task}, timeout=self.config.timeout_s)
        if not done:
            task.cancel()
            raise MethodTimeoutError(is_thread)
        return task.result()


def main() -> None:
    """Serve until the other end closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    end_with_parent()
    with suppress(EOFError, ConnectionError):  # nobody is at the other end any more
        _serve(Connection(int(sys.argv[1])))


def _serve(connection: Connection) -> None:
    config = connection.recv()
    try:
        make = load_environment(config)
    except HybridflowError as error:
        connection.send(NotLoaded(str(error)))
        return
    except Exception:
        connection.send(NotLoaded(f"the environment does not load:\n{shortened(traceback.format_exc())}"))
        return
    connection.send(Loaded())
    asyncio.run(Episodes(connection, config, make).serve())
