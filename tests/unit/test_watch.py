"""The controller's own code has a limit, and a line says what it does meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from hybridflow import interrupts
from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller import watch
from hybridflow.controller.cost import CallLog
from hybridflow.controller.waiting import bounded
from hybridflow.errors import CallTimeoutError


def sleeps() -> None:
    time.sleep(60)


def computes() -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        sum(range(100))


@pytest.mark.parametrize("hangs", [sleeps, computes])
def test_code_that_hangs_on_the_controller_is_named(
    hangs: Callable[[], None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="hybridflow")
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(watch, "SECONDS_OF_SILENCE", 0.5)
    started = time.monotonic()
    expected = rf"has got nowhere for run\.timeout_s=2 s; it is in {hangs.__name__} \(test_watch\.py"
    with (
        interrupts.noticed(),
        pytest.raises(CallTimeoutError, match=expected),
        watch.watched(Config(run=RunConfig(timeout_s=2.0)), CallLog()),
    ):
        hangs()
    assert time.monotonic() - started < 30
    assert f" s: {hangs.__name__} (test_watch.py:" in caplog.messages[0]


def test_calls_and_waits_with_limits_of_their_own_are_no_reason_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.05)
    log = CallLog()
    with interrupts.noticed(), watch.watched(Config(run=RunConfig(timeout_s=1.0)), log):
        bounded(lambda: time.sleep(2.0), 60.0, "something")
        for _ in range(8):
            time.sleep(0.25)
            log.sent(0, 0.0)


def test_what_takes_longer_than_its_limit_is_left_behind_and_named() -> None:
    with pytest.raises(CallTimeoutError, match=r"ending Ray has not ended after 0\.2 s: sleeps \(test_watch\.py"):
        bounded(sleeps, 0.2, "ending Ray")
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, 5.0, "a division")
    assert bounded(lambda: 3, 5.0, "a number") == 3
