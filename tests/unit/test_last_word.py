"""Code in C that never gives the interpreter back is ended from beside, with words."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import ctypes, sys
from hybridflow.controller.waiting import ended_after
with ended_after(float(sys.argv[1]), "connecting to Ray"):
    ctypes.PyDLL(None).usleep(int(float(sys.argv[2]) * 1e6))  # holds the interpreter
print("on it goes")
"""


def started(folder: Path, limit_s: float, seconds: float) -> tuple[int, str, str]:
    command = [sys.executable, "-c", PROGRAM, str(limit_s), str(seconds)]
    environment = {"TMPDIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    return done.returncode, done.stdout, done.stderr


def test_what_holds_the_interpreter_is_ended_and_told(tmp_path: Path) -> None:
    begun = time.monotonic()
    code, said, told = started(tmp_path, 1.0, 60.0)
    assert code == 1 and not said and time.monotonic() - begun < 50
    (file,) = tmp_path.iterdir()
    assert told.strip().splitlines() == [
        "The run failed.",
        f"connecting to Ray has not ended after 1 s. What every thread was doing is in {file}",
    ]
    assert 'File "<string>", line 5' in file.read_text()


def test_what_ends_in_time_leaves_nothing_behind(tmp_path: Path) -> None:
    assert started(tmp_path, 30.0, 0.01) == (0, "on it goes\n", "")
    assert not list(tmp_path.iterdir())
