"""Ctrl-C, SIGTERM and SIGHUP, noticed even where Python loses them.

KeyboardInterrupt is raised wherever the main thread happens to be. In a finalizer or a callback from C, of which a call through
Ray has many, it is printed and forgotten, and the run would go on as if nobody had asked it to stop. Where Ray passes it on,
the number of the signal is lost. So every signal is noted here as well.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

HEEDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Of a user, of a scheduler or `ray job stop`, and of a terminal that was closed."""

WAKING = signal.SIGUSR1
"""Wakes the main thread for what another thread has found out."""


@dataclass
class _Noted:
    """What has arrived. A handler that took a lock could interrupt itself while it has it."""

    lost: list[int] = field(default_factory=list)
    """Signals that nobody has seen."""
    first: int | None = None
    """The one that the run ends for."""
    is_ending: bool = False
    """From then on signals raise nothing: what ends a run must run to its end. They shorten it."""
    is_urgent: bool = False
    failure: BaseException | None = None
    """What another thread has found out, for the main thread to raise."""


_noted = [_Noted()]
"""Of the present run; a process may have several, one after the other."""


@contextmanager
def noticed() -> Iterator[None]:
    """Within the block `raise_if_lost` knows of every signal. Elsewhere than in the main thread nothing changes, nor is a
    signal taken from a program that has a handler of its own or, as in the background or under nohup, ignores it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _noted[0] = _Noted()
    before = {number: signal.getsignal(number) for number in HEEDED}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _note)
    before[WAKING] = signal.signal(WAKING, _wake)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def heed_sigterm() -> None:
    """In a block of `noticed`, let SIGTERM do what Ctrl-C does. To be called when Ray has started: its own handler aborts the
    process with a trace of C++."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _note)


def fail(error: BaseException) -> None:
    """Have the main thread raise `error`, wherever it is, in a block of `noticed`. In a call to Ray it becomes a
    KeyboardInterrupt: `failure` is what was meant."""
    if not _noted[0].is_ending:
        _noted[0].failure = error
        signal.pthread_kill(threading.main_thread().ident or 0, WAKING)


def failure() -> BaseException | None:
    """What `fail` was given."""
    return _noted[0].failure


def raise_if_lost() -> None:
    """Raise what nobody has seen, in the main thread: the error of `fail`, or a KeyboardInterrupt with the signal's number."""
    error = _noted[0].failure
    if error is not None and not _noted[0].is_ending and threading.current_thread() is threading.main_thread():
        raise error
    if _noted[0].lost and threading.current_thread() is threading.main_thread():
        number = _noted[0].lost[-1]
        _noted[0].lost.clear()
        raise KeyboardInterrupt(number)


def seen() -> None:
    """What was raised has arrived: the run is ending, and further signals raise nothing."""
    _noted[0].lost.clear()
    _noted[0].is_ending = True


def is_urgent() -> bool:
    """Whether a signal has come while the run was ending: whoever sent it does not want to wait."""
    return _noted[0].is_urgent


def number() -> int | None:
    """The signal that came before the run began to end; None where it ends for another reason."""
    return _noted[0].first


def _wake(signal_number: int, frame: FrameType | None) -> None:
    error = _noted[0].failure
    if error is not None and not _noted[0].is_ending:
        raise error


def _note(signal_number: int, frame: FrameType | None) -> None:
    if _noted[0].is_ending:
        _noted[0].is_urgent = True
        return
    _noted[0].first = _noted[0].first or signal_number
    _noted[0].lost.append(signal_number)
    raise KeyboardInterrupt(signal_number)
