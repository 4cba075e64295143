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
from hybridflow.data.prepare import HubName, PreparedRow, run_from_command_line
from hybridflow.ending import ended_command

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
from hybridflow.ending import as_process, ended_command
def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        Path(sys.argv[1]).touch()  # as what removes a file that is half written
    return 0
as_process(lambda: ended_command("The export", work))
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


COMMANDS = {
    "export": ("checkpoint.export:export_checkpoint", "'c', 'd'"),
    "report": ("trackers.plots:plot_run", "'r'"),
    "evaluate": ("evaluate:evaluation_config", "'m', '--data', 'd'"),
    "model_merger": ("checkpoint.export:export_checkpoint", "'merge', '--local_dir', 'c'"),
    "data.__main__": ("data.__main__:check_file", "'check', 'f'"),
}
"""Module -> a part of it that is to fail, and arguments."""


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_ends_there(module: str) -> None:
    """By what it says and the code that it ends with where it fails in a way that nobody has foreseen."""
    part, arguments = COMMANDS[module]
    place, _, name = part.partition(":")
    code = f"""
import sys, hybridflow.{module}, hybridflow.{place}
def fails(*_, **__):
    raise LookupError("nobody has foreseen this")
hybridflow.{place}.{name} = fails
sys.exit(hybridflow.{module}.main([{arguments}]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    head, what, where = found.stderr.strip().splitlines()
    assert re.fullmatch(r"The \w+ failed\.", head) and what.startswith("LookupError: nobody has foreseen this")
    Path(where.removeprefix("The whole trace is in ")).unlink()


def test_a_preparation_ends_there_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1+1"}\n')

    def fails(*_: object) -> PreparedRow:
        raise LookupError("nobody has foreseen this")

    arguments = ["--local_dir", str(tmp_path / "out"), "--source", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        run_from_command_line(fails, hub=HubName(name="none"), arguments=arguments)
    head, what, where = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1 and head == "The preparation failed." and what.startswith("LookupError: nobody has")
    Path(where.removeprefix("The whole trace is in ")).unlink()


SAYS = """
import os, sys
from hybridflow.ending import as_process, ended_command, show
def work():
    for number in range(5000):
        show(f"line {number}\\n" * 20)
    with open(sys.argv[1], "w") as file:
        assert file.fileno() > 2, "what is written to a closed stream would go into this file"
    return 3
as_process(lambda: ended_command("The check", work))
"""


@pytest.mark.parametrize(
    ("redirection", "code", "lines"),
    [("| head -1", 141, 1), (">&- 2>&- <&-", 3, 0), (">/dev/full", 1, 0)],
    ids=["nobody reads on", "closed", "full"],
)
def test_streams_that_take_nothing_end_no_command_in_a_trace(redirection: str, code: int, lines: int, tmp_path: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -c '{SAYS}' {tmp_path}/file {redirection}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (found.returncode, len(found.stdout.splitlines())) == (code, lines)
    assert "Traceback" not in found.stderr and "Exception ignored" not in found.stderr
    assert ("No space left" in found.stderr) == (redirection == ">/dev/full")


def test_a_preparation_with_closed_streams_writes_its_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "1+1", "answer": "two #### 2"}\n')
    script = Path(__file__).parents[2] / "examples/gsm8k/prepare.py"
    command = f"{sys.executable} {script} --source {tmp_path} --local_dir {tmp_path}/out <&- >&-"
    found = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert (tmp_path / "out/train.parquet").is_file()
