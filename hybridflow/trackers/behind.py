"""A tracker on a thread of its own: what it takes is off the path of a step, and nobody waits for one that hangs."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from hybridflow.trackers.base import Tracker

T = TypeVar("T")

MAX_WAITING = 1000
"""Calls that a tracker may be behind; later ones are lost to it."""
LATE_S = 30.0
"""After which a call to a tracker is said to be late."""
CLOSE_S = 30.0
"""For what is left when the run ends; a tracker that was late before has less."""
CLOSE_LATE_S = 3.0
MAX_CHARACTERS = 500
"""Of what is said of an error."""


def message_of(error: BaseException) -> str:
    """What someone else's code has raised, in its own words, or by its type where it has none.

    Example:
        >>> message_of(ValueError("no key")), message_of(SystemExit())
        ('no key', 'SystemExit')
    """
    try:
        return str(error).strip()[:MAX_CHARACTERS] or type(error).__name__
    except Exception as broken:
        return f"{type(error).__name__}, whose text cannot be had ({type(broken).__name__})"


class Behind:
    """Calls to one tracker, made one after the other while the run goes on. The first failure or delay is told."""

    def __init__(self, build: Callable[[], Tracker], tell: Callable[[str], None]):
        """`build` makes the tracker, on its thread as well; `tell` is called with what is wrong, once."""
        self._build, self._tell = build, tell
        self._lock = threading.Lock()
        self._has_told = False
        self._waiting = queue.Queue[Callable[["Tracker"], None] | None](MAX_WAITING)
        self._since: float | None = None
        """When the present call began."""
        self._thread = threading.Thread(target=self._run, name="hybridflow-tracker", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[Tracker], None]) -> None:
        """Have `function` called with the tracker, soon."""
        self._look()
        try:
            self._waiting.put_nowait(function)
        except queue.Full:
            self._told(f"is {MAX_WAITING} calls behind")

    def close(self) -> None:
        """Wait until all is taken and the tracker is closed, or for as long as it may take."""
        limit_s = CLOSE_LATE_S if self._look() else CLOSE_S
        try:
            self._waiting.put_nowait(lambda tracker: tracker.close())
            self._waiting.put_nowait(None)
        except queue.Full:
            limit_s = CLOSE_LATE_S
        self._thread.join(limit_s)
        if self._thread.is_alive():
            self._told(f"has not taken everything within {limit_s:g} s of the end of the run, and is left")

    def _look(self) -> bool:
        """Whether the present call is late."""
        since = self._since
        is_late = since is not None and time.monotonic() - since > LATE_S
        if is_late:
            self._told(f"has been busy with one call for more than {LATE_S:g} s; the run goes on without it")
        return is_late

    def _run(self) -> None:
        tracker = self._tried(self._build)
        while (function := self._waiting.get()) is not None:
            if tracker is not None:
                self._tried(partial(function, tracker))

    def _tried(self, function: Callable[[], T]) -> T | None:
        """What `function` returns; None where it fails, which is told."""
        self._since = time.monotonic()
        try:
            return function()
        except BaseException as error:  # whatever a library or a user's class raises: a dashboard is not worth the run
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(message_of(error).split())
            self._told(f"failed: {type(error).__name__}: {said} [{Path(frame.filename).name}:{frame.lineno}]")
            return None
        finally:
            self._since = None

    def _told(self, what: str) -> None:
        with self._lock:
            is_first, self._has_told = not self._has_told, True
        if is_first:
            self._tell(what)
