"""Ctrl-C reaches the run wherever the main thread is when it comes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from hybridflow import interrupts
from tests.ray.forgetful import InterruptedAtItsEnd


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """Ctrl-C as a program in the foreground has it; a job in the background is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_a_finalizer_swallows_is_raised_at_the_next_call() -> None:
    with interrupts.noticed():
        InterruptedAtItsEnd()
        with pytest.raises(KeyboardInterrupt):
            interrupts.raise_if_lost()
        interrupts.raise_if_lost()  # once


def test_what_arrives_is_raised_once_where_it_came() -> None:
    with interrupts.noticed():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.seen()
        interrupts.raise_if_lost()


def test_sigterm_is_heeded_where_ctrl_c_is_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.getsignal(signal.SIGTERM)  # as of a job in the background
    try:
        with interrupts.noticed():
            interrupts.heed_sigterm()
            with pytest.raises(KeyboardInterrupt, match=str(int(signal.SIGTERM))):
                signal.raise_signal(signal.SIGTERM)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.SIG_IGN, before[1])
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_only_the_main_thread_is_interrupted_and_handlers_of_the_program_stay() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.signal(signal.SIGINT, mine)
    try:
        with interrupts.noticed():
            assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    raised: list[BaseException] = []

    def elsewhere() -> None:
        try:
            interrupts.raise_if_lost()
        except BaseException as error:
            raised.append(error)

    with interrupts.noticed():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert raised == []
        interrupts.seen()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
