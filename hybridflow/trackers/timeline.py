"""When each call of a run was at work, pool by pool: `timeline.json` in the run's folder, and a picture of its last steps.

The file is in Chrome's trace event format (JSON array), which https://ui.perfetto.dev and chrome://tracing show; the closing
bracket may be missing there, so that a run only appends.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hybridflow.trackers.jsonl import LineFile, drop_later_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECONDS_WORTH_SHOWING = 1e-3
STEPS_SHOWN = 6
"""The picture's last steps; the file has all."""


@dataclass(frozen=True)
class Span:
    """A call at work on the slowest of its ranks."""

    pool: str
    name: str
    """`role.method`."""
    began: float
    """Seconds since the epoch, by the clock of the rank's node."""
    seconds: float
    step: int = 0

    @property
    def role(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]


class TimelineFile:
    """`timeline.json` of a run, one event per line."""

    def __init__(self, folder: Path, *, resume_step: int):
        """A new run, whose `resume_step` is 0, puts the file of an earlier one aside; a resumed one goes on in it."""
        path = folder / "timeline.json"
        if resume_step == 0:
            drop_later_lines(path, 0)
        self._file = LineFile(path, end=",\n")
        if self._file.is_empty:
            self._file.write("[\n")
        self._numbers: dict[tuple[str, ...], int] = {}

    def write(self, step: int, spans: Iterable[Span]) -> None:
        """Append what was at work in a step. Calls of less than a millisecond are left out."""
        for span in spans:
            if span.seconds >= SECONDS_WORTH_SHOWING:
                pid, tid = self._number("process_name", span.pool), self._number("thread_name", span.pool, span.role)
                times = {"ts": round(span.began * 1e6), "dur": round(span.seconds * 1e6)}
                self._file.append({"name": span.name, "ph": "X", **times, "pid": pid, "tid": tid, "args": {"step": step}})

    def close(self) -> None:
        """Nothing is held back; only the file is closed."""
        self._file.close()

    def _number(self, kind: str, pool: str, *role: str) -> int:
        """The format wants numbers and names them in events of their own."""
        key = (pool, *role)
        if key not in self._numbers:
            self._numbers[key] = len(self._numbers)
            pid = self._numbers[(pool,)]
            self._file.append(
                {"name": kind, "ph": "M", "pid": pid, "tid": self._numbers[key], "args": {"name": (role or (pool,))[0]}}
            )
        return self._numbers[key]


def read_spans(path: Path) -> list[Span]:
    """The calls in a file that `TimelineFile` wrote; lines that a kill or a power cut have spoilt are left out."""
    pools: dict[int, str] = {}
    spans = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, KeyError, TypeError):
            event = json.loads(line.removesuffix(b","))
            if event["name"] == "process_name":
                pools[event["pid"]] = event["args"]["name"]
            elif event["ph"] == "X":
                began, seconds = event["ts"] / 1e6, event["dur"] / 1e6
                spans.append(Span(pools[event["pid"]], event["name"], began, seconds, event["args"]["step"]))
    return spans


def drawn_timeline(spans: Sequence[Span], title: str) -> Figure:
    """The last steps, one bar for each call, one row for each role of a pool."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    last = max(span.step for span in spans)
    shown = [span for span in spans if span.step > last - STEPS_SHOWN]
    start = min(span.began for span in shown)
    rows = sorted({(span.pool, span.role) for span in shown}, reverse=True)
    names = list(dict.fromkeys(span.name for span in sorted(shown, key=lambda span: -span.seconds)))
    figure = Figure(figsize=(13, 1.8 + 0.5 * len(rows)), layout="constrained")
    figure.suptitle(f"{title}: what was at work when, steps {min(span.step for span in shown)} to {last}", fontsize=12)
    axes = figure.add_subplot()
    for index, name in enumerate(names):
        of_name = [span for span in shown if span.name == name]
        row = rows.index((of_name[0].pool, of_name[0].role))
        bars = [(span.began - start, span.seconds) for span in of_name]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colormaps["tab20"](index % 20), label=name, edgecolor="white")
    axes.set_yticks(range(len(rows)), [f"{pool}: {role}" for pool, role in rows])
    axes.set_xlabel("seconds")
    axes.grid(visible=True, axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=6, frameon=False, fontsize=8)
    return figure
