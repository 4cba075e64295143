"""Ctrl-C, noticed even where Python loses it.

KeyboardInterrupt is raised wherever the main thread happens to be. In a finalizer or a callback from C, of which a call through
Ray has many, it is printed and forgotten, and the run would go on as if nobody had asked it to stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_lost: list[bool] = []
"""Not empty while a Ctrl-C has not arrived. A handler that took a lock could interrupt itself while it has it."""


@contextmanager
def noticed() -> Iterator[None]:
    """Within the block `raise_if_lost` knows of every Ctrl-C. Elsewhere than in the main thread, and where the program has a
    handler of its own, nothing changes."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    seen()
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raise_if_lost() -> None:
    """Raise the KeyboardInterrupt that nobody has seen, in the main thread."""
    if _lost and threading.current_thread() is threading.main_thread():
        seen()
        raise KeyboardInterrupt


def seen() -> None:
    """What was raised has arrived: the run is ending."""
    _lost.clear()


def _note(signal_number: int, frame: FrameType | None) -> None:
    _lost.append(True)
    raise KeyboardInterrupt
