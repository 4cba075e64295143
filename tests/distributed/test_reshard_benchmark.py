"""The benchmark of weight syncs, on one pool and between two: each part that occurs is among its medians."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ONE_POOL = {"sync/seconds_gather", "sync/seconds_load", "sync/seconds_checksum"}
TWO_POOLS = {"sync/send_seconds_gather", "sync/send_seconds_transfer", "sync/send_seconds_checksum"}
TWO_POOLS |= {"sync/seconds_transfer", "sync/seconds_load", "sync/seconds_checksum"}


@pytest.mark.slow
@pytest.mark.parametrize(("num_trainers", "ranks", "parts"), [(0, "2", ONE_POOL), (1, "1to1", TWO_POOLS)])
def test_parts_of_a_sync_are_measured(tmp_path: Path, num_trainers: int, ranks: str, parts: set[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "benchmarks.reshard", "--shape", "tiny", "--engine", "torch", "--device", "cpu", "--syncs", "2"]
    command += ["--trainers", str(num_trainers), "--folder", str(tmp_path / "models"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    result = json.loads((tmp_path / f"reshard_tiny_{ranks}_tp1.json").read_text())
    measured = {name for name in result["medians"] if "seconds_" in name}
    assert measured - {"seconds_wall", "seconds_send_wall", "seconds_reset_alone"} == parts
    assert len(result["syncs"]) == 4
