"""Any wait is bounded, and who is stuck is named with what it does, wherever others wait for it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from hybridflow.batch import Batch
from hybridflow.config.pools import parse_pool
from hybridflow.controller import placement, stacks, waiting
from hybridflow.controller.group import Pool
from hybridflow.controller.placement import introduce, start_pool
from hybridflow.controller.rank_process import RankPlace, RankProcess
from hybridflow.errors import CallTimeoutError, WorkerError
from tests.ray.conftest import make_group


@pytest.fixture
def cluster(ordinary_cluster: None) -> None:
    """Processes that Ray starts itself: what is seen of them while they start is a subject here."""


@pytest.fixture
def met(pool: Pool) -> Iterator[Pool]:
    """Two ranks that have joined torch.distributed, whose own limit is longer than that of any call."""
    address = ray.get(pool.processes[0].rendezvous_address.remote())
    ray.get([process.connect.remote(address, 600.0) for process in pool.processes])
    yield pool


def stuck(call: object, *args: object) -> tuple[str, str]:
    """What is said of a call that takes too long, and the note with all stacks; both within the time that is promised."""
    started = time.monotonic()
    with pytest.raises(CallTimeoutError) as raised:
        call(*args)  # type: ignore[operator]
    assert time.monotonic() - started < 60
    return str(raised.value), "".join(raised.value.__notes__)


def test_a_rank_that_was_stopped_is_named(pool: Pool) -> None:
    text, notes = stuck(make_group(pool, timeout_s=2.0).stop_on_rank_one)
    assert "echo.stop_on_rank_one has not ended after run.timeout_s=2 s on 1 rank(s): rank 1 (node" in text
    assert "of pool 'main' is stuck: stopped by a signal (SIGSTOP), in EchoWorker.stop_on_rank_one (fake_workers.py:" in text
    assert "pool 'main' rank 0" in notes and ": idle" in notes
    os.kill(pool.identities[1].pid, signal.SIGCONT)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_waits_for_another_is_not_blamed(met: Pool, late: int) -> None:
    text, _ = stuck(make_group(met, timeout_s=3.0).meet, late)
    assert "on 2 rank(s): rank 0" in text, "neither has answered"
    assert text.count("is stuck") == 1 and f"rank {late} (node" in text.partition("rank(s): ")[2].partition(". ")[2]
    assert "is stuck: EchoWorker.meet (fake_workers.py:" in text and "1 other rank(s) wait for it" in text


def test_a_rank_of_another_pool_that_is_waited_for_is_named(met: Pool, cluster: None) -> None:
    others, group = start_pool("gen", parse_pool("1x1 cpu"), "cpu", {})
    introduce([met, others], 60.0)
    make_group(others, timeout_s=60.0).sleep.start(60.0)  # what the ranks of `main` wait for
    text, _ = stuck(make_group(met, timeout_s=3.0).wait_for_weights)
    assert "echo.wait_for_weights has not ended" in text and "on 2 rank(s)" in text
    assert "rank 0 (node" in text and "of pool 'gen' is stuck: EchoWorker.sleep (fake_workers.py:" in text
    assert text.count("is stuck") == 1 and "2 other rank(s) wait for it" in text
    others.end()
    ray.util.remove_placement_group(group)


def test_where_py_spy_may_not_look_ranks_write_their_own_stacks(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks.shutil, "which", lambda *_, **__: None)
    group = make_group(pool, timeout_s=2.0)
    assert "is stuck: sleep (fake_workers.py:" in stuck(group.sleep, 20.0)[0]


def test_a_rank_that_holds_the_interpreter_is_named(pool: Pool) -> None:
    text, _ = stuck(make_group(pool, timeout_s=2.0).hold_the_interpreter)
    assert "hold_the_interpreter (fake_workers.py:" in text


class HangingRankProcess(RankProcess):
    """Whose constructor never returns."""

    def __init__(self, place: RankPlace):
        time.sleep(600)


def test_ranks_that_do_not_come_up_are_named(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "RankProcess", HangingRankProcess)
    pool, group = start_pool("slow", parse_pool("1x1 cpu"), "cpu", {})
    text, notes = stuck(introduce, [pool], 8.0)
    assert "pool 'slow'.start has not ended after run.timeout_s=8 s on 1 rank(s): rank 0 of pool 'slow'" in text
    assert "Their processes have not come up. process " in text
    assert re.search(r"HangingRankProcess\.__init__ \(.*test_waits\.py:\d+\)", text)
    assert "in which Python starts" in notes
    pool.end()
    ray.util.remove_placement_group(group)


def test_a_line_says_who_is_waited_for(pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="hybridflow")
    monkeypatch.setattr(waiting, "SECONDS_OF_SILENCE", 0.4)
    make_group(pool).sleep(1.5)
    lines = [message for message in caplog.messages if message.startswith("echo.sleep: 0 of 2 ranks are done; after")]
    assert len(lines) >= 3 and all("rank 0 (node" in line and "rank 1 (node" in line for line in lines)


@pytest.mark.parametrize("kind", ["exit", "interrupt", "base"])
def test_whatever_a_rank_raises_is_told_with_its_place(pool: Pool, kind: str) -> None:
    with pytest.raises(WorkerError, match=r"echo\.leave failed on rank 1 \(node"):
        make_group(pool).leave(kind)
    assert make_group(pool).rank() == 0, "its process goes on"


def test_a_result_that_cannot_be_sent_is_told_with_its_place(pool: Pool) -> None:
    with pytest.raises(WorkerError, match=r"(?s)echo\.return_what_cannot_be_sent failed on rank 1 \(node.*cannot pickle"):
        make_group(pool).return_what_cannot_be_sent()


def test_a_result_that_callers_cannot_use_is_told_with_its_place(pool: Pool) -> None:
    expected = (
        r"(?s)echo\.forget_to_return failed on rank 1 \(node.*EchoWorker\.forget_to_return returns a Metrics; found nothing"
    )
    with pytest.raises(WorkerError, match=expected):
        make_group(pool).forget_to_return(Batch({"prompt_tokens": np.ones(4, np.int32)}))
