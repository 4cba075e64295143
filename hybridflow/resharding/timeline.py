"""Seconds per part of a sync, told apart without stopping the device."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Timeline:
    """Splits elapsed time into named parts. On CUDA the marks are events in the current stream, read once at the end."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []
        self.mark("")

    def mark(self, part: str) -> None:
        """Everything since the last mark was `part`."""
        if not self._is_cuda:
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((part, event))

    def seconds(self) -> dict[str, float]:
        """Seconds per part. Waits for the device."""
        totals: dict[str, float] = defaultdict(float)
        if self._is_cuda:
            torch.cuda.current_stream().synchronize()
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if isinstance(before, float) and isinstance(after, float):
                totals[part] += after - before
            elif isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                totals[part] += before.elapsed_time(after) / 1000
        return dict(totals)
