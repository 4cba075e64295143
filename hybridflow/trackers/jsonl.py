"""`metrics.jsonl` and `samples.jsonl` in the run's folder: one JSON object per line, always written."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridflow.config.schema import Config
from hybridflow.disk import retried, unused, write_durably
from hybridflow.errors import RunFolderError
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker, run_folder

logger = logging.getLogger(__name__)


class LineFile:
    """A file that grows by whole lines, each handed to the operating system when it is complete."""

    def __init__(self, path: Path, *, end: str = "\n"):
        """`end` is that of every line. One that a kill cut short is taken away: it would spoil the next one."""
        self.path, self.end = path, end
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_num_whole_bytes(path))

    @property
    def is_empty(self) -> bool:
        """Whether it has no line yet."""
        return os.fstat(self._file.fileno()).st_size == 0

    def append(self, content: Mapping[str, object]) -> None:
        """Write one line, an object in JSON; after a passing failure of the disk once more, from where it began.

        Raises:
            OSError: it could not be written; names it.
            RunFolderError: it is not the file any more that has its name.
        """
        self.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + self.end)

    def write(self, text: str) -> None:
        """As `append`, of whole lines as they are."""
        line = text.encode()
        size = os.fstat(self._file.fileno()).st_size

        def write() -> None:
            self._file.truncate(size)
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]

        try:
            retried(self.path, write)
        except OSError:
            self._file.truncate(size)
            raise
        if not self.path.exists() or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise RunFolderError(f"{self.path} was removed or replaced while the run was writing it")

    def flush(self) -> None:
        """Put all lines on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it."""
        self._file.close()


class JsonlTracker(Tracker):
    """One line per step, and one per sample. A resumed run's file equals that of an uninterrupted one, but for times.

    Every line is handed to the operating system when it is complete, so a killed run loses at most the line it was writing.
    """

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        folder = run_folder(config)
        aside = [drop_later_lines(folder / name, resume_step) for name in ("metrics.jsonl", "samples.jsonl")]
        if moved := [path.name for path in aside if path is not None]:
            logger.info("a new run begins in %s; what an earlier one measured there is kept as %s", folder, " and ".join(moved))
        self._metrics, self._samples = LineFile(folder / "metrics.jsonl"), LineFile(folder / "samples.jsonl")

    def log(self, step: int, metrics: Metrics) -> None:
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._metrics.append({"step": step, "time": time.time(), **values})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples:
            reward = sample.reward if math.isfinite(sample.reward) else None
            self._samples.append({"step": step, **vars(sample), "reward": reward})

    def flush(self) -> None:
        self._metrics.flush()
        self._samples.flush()

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()


def drop_later_lines(path: Path, resume_step: int) -> Path | None:
    """Leave only whole lines of steps up to `resume_step`, since later ones will be taken again.

    For a new run, whose `resume_step` is 0, the file of another run in the same folder is put aside, with the time of its last
    line in its name, which is returned.
    """
    if not path.exists():
        return None
    if resume_step == 0:
        if not path.stat().st_size:
            return None
        ended = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        return path.rename(unused(path.with_name(f"{path.stem}.until-{ended}{path.suffix}")))
    kept = [line for line in _lines(path) if _step_of(line) <= resume_step]
    write_durably(path, b"".join(kept).decode())
    return None


def read_lines(path: Path) -> list[dict[str, object]]:
    """The objects in a file that this tracker wrote; a line that a kill cut short is left out."""
    return [json.loads(line) for line in _lines(path) if _step_of(line) != math.inf]


def _num_whole_bytes(path: Path, *, longest: int = 1 << 24) -> int:
    """Up to the end of the last whole line, which is found where what follows is no longer than `longest`."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - longest))
        end = file.read().rfind(b"\n")
    return start + end + 1 if end >= 0 or not start else size


def _lines(path: Path) -> list[bytes]:
    """Split as bytes: text may have U+2028 and other ends of lines within it, and a power cut may leave no text at all."""
    return path.read_bytes().splitlines(keepends=True)


def _step_of(line: bytes) -> float:
    """The step of a line; infinity where the line is not whole."""
    if not line.endswith(b"\n"):
        return math.inf
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
