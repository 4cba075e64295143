"""What the controller itself costs: bytes that pass through it, and its time between the calls."""

from __future__ import annotations

import io
import pickle
import threading
from dataclasses import dataclass, field

import ray

from hybridflow.metrics import Metric, Metrics
from hybridflow.trackers.timeline import Span

SECONDS_WORTH_LOGGING = 1e-4


class _Sizer(pickle.Pickler):
    """Pickles to measure; a reference to the object store counts as the few bytes that it is."""

    def persistent_id(self, value: object) -> object:
        return value.hex() if isinstance(value, ray.ObjectRef) else None


def pickled_size(value: object) -> int:
    """Bytes that sending `value` takes, token-level data in the object store not counted."""
    if not value:
        return 0
    buffer = io.BytesIO()
    _Sizer(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.tell()


@dataclass
class CallLog:
    """Sums over the calls of a step, and peaks since the run began; the groups write it, the loop drains it. Thread-safe."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    seconds: dict[str, float] = field(default_factory=dict)
    """`role.method` -> seconds of the slowest rank, added over calls."""
    num_bytes: int = 0
    num_calls: int = 0
    memory: dict[str, float] = field(default_factory=dict)
    """`peak_allocated_gib`, `peak_reserved_gib` -> of the GPU that used most since the run began. A rank reports what it
    holds since it last reset its count, as a weight sync does to measure its own peak."""
    of_workers: Metrics = field(default_factory=Metrics)
    """What workers have reported."""
    num_events: int = 0
    """Calls and answers since the run began: while it rises, the run gets on."""
    spans: list[Span] = field(default_factory=list)
    """When each call was at work."""
    own_seconds: float = 0.0
    """Spent distributing arguments and collecting results."""

    def sent(self, num_bytes: int, own_seconds: float) -> None:
        """Note a call that went out."""
        with self.lock:
            self.num_calls += 1
            self.num_events += 1
            self.num_bytes += num_bytes
            self.own_seconds += own_seconds

    def answered(self, span: Span, num_bytes: int, own_seconds: float) -> None:
        """Note its answers."""
        with self.lock:
            self.num_events += 1
            self.seconds[span.name] = self.seconds.get(span.name, 0.0) + span.seconds
            self.spans.append(span)
            self.num_bytes += num_bytes
            self.own_seconds += own_seconds

    def reported(self, metrics: Metrics) -> None:
        """Note what workers have reported beside their answers."""
        if metrics:
            with self.lock:
                self.of_workers += metrics

    def used(self, *, allocated_gib: float, reserved_gib: float) -> None:
        """Note the memory peaks of a rank."""
        with self.lock:
            for name, peak in (("peak_allocated_gib", allocated_gib), ("peak_reserved_gib", reserved_gib)):
                self.memory[name] = max(self.memory.get(name, 0.0), peak)

    def take_spans(self) -> list[Span]:
        """When calls that have been answered since the last time were at work."""
        with self.lock:
            taken, self.spans = self.spans, []
        return taken

    def drain(self) -> Metrics:
        """Sums, peaks and what workers reported as metrics; all but the peaks start anew. Calls that did no work to speak of
        are left out."""
        with self.lock:
            phases = {name: seconds for name, seconds in self.seconds.items() if seconds > SECONDS_WORTH_LOGGING}
            metrics = {f"seconds/{name}": Metric(seconds, kind="sum") for name, seconds in phases.items()}
            metrics["controller/bytes_per_step"] = Metric(self.num_bytes, kind="sum")
            metrics["controller/calls"] = Metric(self.num_calls, kind="sum")
            metrics["controller/milliseconds_per_step"] = Metric(self.own_seconds * 1e3, kind="sum")
            metrics |= {f"memory/{name}": Metric(peak, kind="max") for name, peak in self.memory.items()}
            drained = Metrics(metrics) + self.of_workers
            self.seconds, self.num_bytes, self.num_calls, self.own_seconds = {}, 0, 0, 0.0
            self.of_workers = Metrics()
        return drained
