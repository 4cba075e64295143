"""Sizes of pools, and the slots of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.config import pools
from hybridflow.config.pools import PoolSize, cpu_slots_of_this_machine, gpus_of_this_machine, parse_pool
from hybridflow.errors import PlacementError


@pytest.mark.parametrize(
    ("text", "size"),
    [("2x8", PoolSize(2, 8)), ("1x4 cpu", PoolSize(1, 4, is_cpu=True)), (" 1 x 1  cpu ", PoolSize(1, 1, is_cpu=True))],
)
def test_a_pool_is_nodes_times_ranks_per_node(text: str, size: PoolSize) -> None:
    assert parse_pool(text) == size
    assert parse_pool(str(size)) == size


@pytest.mark.parametrize("text", ["", "8", "2x", "2x8 gpu", "0x1", "1x0", "-1x2", "1x2cpu"])
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(PlacementError, match=f"found '{text}'"):
        parse_pool(text)


@pytest.mark.parametrize(("visible", "count"), [("", 0), ("-1", 0), ("3", 1), ("0,1,2,3", 4), ("GPU-a,GPU-b", 2)])
def test_visible_devices_are_counted(visible: str, count: int) -> None:
    assert gpus_of_this_machine({"CUDA_VISIBLE_DEVICES": visible}) == count


def test_without_that_variable_the_driver_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "NVIDIA_DRIVER_FOLDER", tmp_path / "gpus")
    assert gpus_of_this_machine({}) == 0
    for bus in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / bus).mkdir(parents=True)
    assert gpus_of_this_machine({}) == 2


def test_a_small_machine_still_has_four_cpu_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert cpu_slots_of_this_machine(None) == 4
    assert cpu_slots_of_this_machine(3) == 3
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert cpu_slots_of_this_machine(None) == 64
