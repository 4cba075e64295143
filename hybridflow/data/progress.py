"""How far a long read is: a bar on a terminal, a log line now and then elsewhere, nothing where it is quick."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TaskID

logger = logging.getLogger(__name__)

SECONDS_OF_SILENCE = 3.0
SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """A context in which `advance` tells how many of `total` rows are done."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self._bar = Bar(console=Console(stderr=True), transient=True)
        self._task: TaskID | None = None
        self._next_sign = time.monotonic() + SECONDS_OF_SILENCE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._task is not None:  # stopping a bar that never started prints an empty line
            self._bar.stop()

    def advance(self, rows: int) -> None:
        """`rows` more are done."""
        self.done += rows
        if self._task is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() >= self._next_sign:
            self._show()

    def _show(self) -> None:
        if self._bar.console.is_terminal:
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done)
            self._bar.start()
            return
        logger.info("%s: %s of %s rows", self.what, f"{self.done:,}", f"{self.total:,}")
        self._next_sign = time.monotonic() + SECONDS_BETWEEN_LINES
