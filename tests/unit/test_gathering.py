"""Requests that come one by one: an idle engine waits for those that follow at once, a busy one for nobody."""

from __future__ import annotations

import time

import pytest

from hybridflow.rollout.step_thread import EngineThread
from tests.unit.test_step_thread import CountingEngine, request


def test_what_comes_back_one_by_one_to_an_idle_engine_starts_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridflow.rollout.step_thread.GAP_S", 2.0)  # a busy machine may be slow to submit
    monkeypatch.setattr("hybridflow.rollout.step_thread.MAX_GATHERING_S", 0.5)
    engine = CountingEngine()
    thread = EngineThread(engine)
    futures = []
    for number in range(5):
        futures += thread.submit([request(number)])
        time.sleep(0.01)
    assert all(future.result(10) for future in futures)
    assert [step for step, _ in engine.admitted] == [0] * 5
    thread.close()


def test_a_busy_engine_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridflow.rollout.step_thread.GAP_S", 1000.0)
    monkeypatch.setattr("hybridflow.rollout.step_thread.MAX_GATHERING_S", 0.2)
    engine = CountingEngine()
    thread = EngineThread(engine)
    engine.may_step.clear()
    running = thread.submit([request(number, max_tokens=3) for number in range(3)])
    deadline = time.monotonic() + 10
    while len(engine.admitted) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(engine.admitted) == 3, "an idle engine waits no longer than it may"
    monkeypatch.setattr("hybridflow.rollout.step_thread.MAX_GATHERING_S", 1000.0)
    added = thread.submit([request(9)])
    engine.may_step.set()
    assert all(future.result(10) for future in [*running, *added])
    thread.close()
