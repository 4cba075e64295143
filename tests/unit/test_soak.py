"""A long run whose process is killed again and again: nothing lost, nothing left, nothing that grows.

Without Ray, over the real loop, folder, trackers and checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hybridflow.checkpoint.store import CheckpointStore

NUM_STEPS, KILL_EVERY = 500, 25
ROOT = Path(__file__).resolve().parents[2]
COMMAND = """
import sys, os
from pathlib import Path
from tests.unit import counting_run
usage = Path(sys.argv[2])
def hook(step):
    if step % 10 == 0:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        with usage.open("a") as file:
            file.write(f"{step} {pages * os.sysconf('SC_PAGE_SIZE')} {len(os.listdir('/proc/self/fd'))}\\n")
ended = counting_run.command(Path(sys.argv[1]), hook, run__total_steps=sys.argv[3], checkpoint__keep="2")
sys.exit(ended.message)
"""


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def listed(folder: str) -> set[str]:
    return {name for name in os.listdir(folder) if name.startswith("hybridflow")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif("HYBRIDFLOW_LONG_TESTS" not in os.environ, reason="takes minutes: HYBRIDFLOW_LONG_TESTS=1 runs it")
def test_five_hundred_steps_with_a_kill_every_25_lose_nothing_and_nothing_grows(tmp_path: Path):
    folder, usage, chance = tmp_path / "run", tmp_path / "usage", random.Random(0)
    before = listed(tempfile.gettempdir()), listed("/dev/shm")
    command = [sys.executable, "-c", COMMAND, str(folder), str(usage), str(NUM_STEPS)]
    num_kills, next_kill = 0, KILL_EVERY
    while True:
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None:
            if next_kill < NUM_STEPS and lines(folder / "metrics.jsonl") >= next_kill:
                time.sleep(chance.random() * 0.02)
                process.send_signal(signal.SIGKILL)
                num_kills, next_kill = num_kills + 1, next_kill + KILL_EVERY
                break
            time.sleep(0.002)
        if process.wait() != -signal.SIGKILL:
            break
    assert process.returncode == 0 and num_kills == NUM_STEPS // KILL_EVERY - 1
    values, value = [], 1
    for step in range(1, NUM_STEPS + 1):
        value = (value * 31 + step) % 1_000_003
        values.append((step, float(value)))
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["value"]) for line in found] == values
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000498", "step_000500"]
    store = CheckpointStore(folder)
    for checkpoint in store.own():
        store.verify(checkpoint.path)
    assert not (folder / "aside").exists()
    assert (listed(tempfile.gettempdir()), listed("/dev/shm")) == before
    numbers = [tuple(map(int, line.split())) for line in usage.read_text().splitlines()]
    early, late = ([use for step, *use in numbers if low <= step < low + 100] for low in (20, 400))
    assert max(memory for memory, _ in late) < 1.1 * max(memory for memory, _ in early)
    assert max(files for _, files in late) <= max(files for _, files in early)
