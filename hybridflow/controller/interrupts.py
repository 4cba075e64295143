"""Ctrl-C and SIGTERM, noticed even where Python loses them.

KeyboardInterrupt is raised wherever the main thread happens to be. In a finalizer or a callback from C, of which a call through
Ray has many, it is printed and forgotten, and the run would go on as if nobody had asked it to stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_lost: list[int] = []
"""Signals that have not arrived. A handler that took a lock could interrupt itself while it has it."""


@contextmanager
def noticed() -> Iterator[None]:
    """Within the block `raise_if_lost` knows of every signal. Elsewhere than in the main thread nothing changes, nor is Ctrl-C
    taken from a program that has a handler of its own or, in the background, ignores it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def heed_sigterm() -> None:
    """In a block of `noticed`, let SIGTERM (of a scheduler, of `ray job stop`) do what Ctrl-C does. To be called when Ray has
    started: its own handler aborts the process with a trace of C++."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _note)


def raise_if_lost() -> None:
    """Raise the KeyboardInterrupt that nobody has seen, in the main thread. Its argument is the number of the signal."""
    if _lost and threading.current_thread() is threading.main_thread():
        number = _lost[-1]
        seen()
        raise KeyboardInterrupt(number)


def seen() -> None:
    """What was raised has arrived: the run is ending."""
    _lost.clear()


def _note(signal_number: int, frame: FrameType | None) -> None:
    _lost.append(signal_number)
    raise KeyboardInterrupt(signal_number)
