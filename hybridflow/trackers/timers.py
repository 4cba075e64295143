"""How long the phases of a step take on the controller's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hybridflow.metrics import Metric, Metrics


class Stopwatch:
    """Adds up the seconds of named phases. Phases may nest; each counts its own whole duration."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block for `seconds/<name>`, also when it raises."""
        start = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start

    def drain(self) -> Metrics:
        """`seconds/<phase>` of every phase since the last call; starts from zero."""
        metrics = {f"seconds/{name}": Metric(seconds, kind="sum") for name, seconds in self._seconds.items()}
        self._seconds = {}
        return Metrics(metrics)
