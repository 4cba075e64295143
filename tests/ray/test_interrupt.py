"""Ctrl-C or SIGTERM at any time: the run ends soon, says what the same command would do, and leaves no process behind."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ray.pausing_workers import MARKER
from tests.ray.processes import StartedProcess, training, wait_until
from tests.ray.runs import Toy, metrics_of, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def after_first_step(run: StartedProcess, folder: Path) -> None:
    run.wait_for(folder / "metrics.jsonl")


def while_roles_are_built(run: StartedProcess, folder: Path) -> None:
    wait_until(lambda: "building actor" in run.log.read_text(), run.log.read_text)


@pytest.mark.parametrize(
    ("moment", "number"),
    [(while_roles_are_built, signal.SIGTERM), (after_first_step, signal.SIGINT)],
)
def test_a_signal_ends_the_run_soon(
    toy: Toy, tmp_path: Path, moment: Callable[[StartedProcess, Path], None], number: signal.Signals
) -> None:
    endless = ["run.total_steps=100000", "trackers.names=[jsonl]"]
    with training([str(toy.config), f"run.folder={tmp_path / 'run'}", *endless], tmp_path / "log") as run:
        moment(run, tmp_path / "run")
        started = time.monotonic()
        os.kill(run.driver.pid, number)
        assert run.wait() == 128 + number, run.log.read_text()
        assert time.monotonic() - started < 30
        assert "received at time=" not in run.log.read_text(), "Ray's own handler"
        assert "Stopped. There is no checkpoint yet: the same command starts anew." in run.log.read_text()
        wait_until(lambda: not run.working(), lambda: "\n".join(run.working()))


def test_a_ctrl_c_that_python_forgets_ends_the_run_too(toy: Toy, forking: Path, tmp_path: Path) -> None:
    settings = ["run.total_steps=100000", "trackers.names=[jsonl]", "algorithm.name=tests.ray.forgetful:Forgetful"]
    with training([str(toy.config), f"run.folder={tmp_path / 'run'}", *settings], tmp_path / "log", forking=forking) as run:
        assert run.wait() == 130, run.log.read_text()
        assert "Exception ignored in" in run.log.read_text(), "the test itself: it arrived"
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1, "it ended in the second step"


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP,)], ids=str)
def test_a_signal_in_a_long_call_has_its_exit_code_and_the_advice_leads_on(
    toy: Toy,
    cluster: None,
    forking: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    numbers: tuple[signal.Signals, ...],
) -> None:
    folder = tmp_path / "run"
    settings = [
        "run.total_steps=8",
        "checkpoint.every_steps=3",
        "placement.workers.actor=tests.ray.pausing_workers:PausesInLearn",
        "algorithm.prompts_per_update=2",
    ]
    with training([str(toy.config), f"run.folder={folder}", *settings], tmp_path / "log", forking=forking) as run:
        run.wait_for(folder / MARKER)
        for number in numbers:
            os.kill(run.driver.pid, number)
            time.sleep(0.5)
        assert run.wait() == 128 + numbers[0], run.log.read_text()
        assert f"Stopped. The same command continues after {folder}/checkpoints/step_000006." in run.log.read_text()
        assert "Traceback" not in run.log.read_text()
        wait_until(lambda: not run.working(), lambda: "\n".join(run.working()))
    with caplog.at_level(logging.INFO, logger="hybridflow"):
        trained(toy, folder, *settings)
    assert f"resumed from {folder}/checkpoints/step_000006" in caplog.text
    assert [line["step"] for line in metrics_of(folder)] == list(range(1, 9))
