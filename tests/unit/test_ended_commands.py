"""Whatever ends a command that trains nothing is told in a few lines, with the exit code of a run."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow import errors
from hybridflow.controller.boundary import ended_command

ANY: list[Callable[[], BaseException]] = [
    lambda: ZeroDivisionError("no rows"),
    lambda: OSError(errno.ENOSPC, "No space left on device", "/tmp/rows.parquet"),
    lambda: MemoryError(),
    lambda: AssertionError(),
    lambda: ModuleNotFoundError("No module named 'vllm'"),
    lambda: errors.WorkerError(role="rollout", rank=1, node="n2", method="generate", cause="ValueError: no"),
]


@pytest.mark.parametrize("make", ANY, ids=lambda make: type(make()).__name__)
def test_an_error_of_any_type_is_told_with_its_place_and_its_trace_is_in_a_file(
    make: Callable[[], BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> int:
        raise make()

    assert ended_command("The export", fails) == 1
    head, what, where = capsys.readouterr().err.strip().splitlines()
    assert head == "The export failed."
    is_of_rank = isinstance(make(), errors.WorkerError)
    assert ("rollout.generate failed on rank 1" if is_of_rank else type(make()).__name__) in what
    trace = Path(where.removeprefix("The whole trace is in "))
    assert "in fails" in trace.read_text()
    trace.unlink()


def test_what_the_package_itself_has_to_say_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((errors.CheckpointError("no such role"), 1), (errors.ConfigError([errors.FieldError("a.b", "no")]), 2)):

        def fails(error: errors.HybridflowError = error) -> int:
            raise error

        assert ended_command("The export", fails) == code
        assert capsys.readouterr().err == f"{error}\n"


LONG = """
import sys, time
from pathlib import Path
from hybridflow.controller.boundary import ended_command, leave
def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        Path(sys.argv[1]).touch()  # as what removes a file that is half written
    return 0
leave(ended_command("The export", work))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_has_its_exit_code_and_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    def with_defaults() -> None:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_DFL)

    command = [sys.executable, "-c", LONG, str(tmp_path / "cleaned")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=with_defaults, env=dict(os.environ)
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    started = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said.strip()) == (128 + number, "Stopped.") and time.monotonic() - started < 10
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize("module", ["export", "report", "evaluate", "model_merger"])
def test_every_command_ends_there(module: str) -> None:
    """By what it says and the code that it ends with where it fails in a way that nobody has foreseen."""
    arguments = {"evaluate": "'m', '--data', 'd'", "report": "'r'", "model_merger": "'merge', '--local_dir', 'c'"}
    parts = {"export": "checkpoint.export:export_checkpoint", "report": "trackers.plots:plot_run"}
    parts |= {"evaluate": "evaluate:evaluation_config", "model_merger": parts["export"]}
    place, _, name = parts[module].partition(":")
    code = f"""
import sys, hybridflow.{module}, hybridflow.{place}
def fails(*_, **__):
    raise LookupError("nobody has foreseen this")
hybridflow.{place}.{name} = fails
sys.exit(hybridflow.{module}.main([{arguments.get(module, "'c', 'd'")}]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    head, what, where = found.stderr.strip().splitlines()
    assert re.fullmatch(r"The \w+ failed\.", head) and what.startswith("LookupError: nobody has foreseen this")
    Path(where.removeprefix("The whole trace is in ")).unlink()
