"""What calls cost, as metrics of a step."""

from __future__ import annotations

from hybridflow.controller.cost import CallLog


def test_memory_peaks_are_those_of_the_run_and_all_else_of_the_step() -> None:
    log = CallLog()
    log.sent(100, own_seconds=0.0)
    log.used(allocated_gib=30.0, reserved_gib=40.0)
    log.used(allocated_gib=20.0, reserved_gib=50.0)  # another rank
    first = log.drain()
    log.used(allocated_gib=25.0, reserved_gib=45.0)  # a weight sync has reset what ranks count
    second = log.drain()
    for metrics in (first, second):
        assert (metrics["memory/peak_allocated_gib"], metrics["memory/peak_reserved_gib"]) == (30.0, 50.0)
    assert (first["controller/bytes_per_step"], second["controller/bytes_per_step"]) == (100, 0)
