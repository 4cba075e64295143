"""Saving a run as a whole, and going on from what was saved."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybridflow.algorithms.base import Algorithm
from hybridflow.checkpoint import advice
from hybridflow.checkpoint.changes import changes, changes_of_the_policy, of_model_or_data
from hybridflow.checkpoint.lineage import GROWING
from hybridflow.checkpoint.resume import resume_point
from hybridflow.checkpoint.store import CheckpointStore, RunState, newest_whole
from hybridflow.config.schema import Config
from hybridflow.config.secrets import as_written
from hybridflow.controller.launch import Launched
from hybridflow.controller.row_source import RowSource
from hybridflow.disk import PASSING, RETRY_S, flush
from hybridflow.errors import (
    CallTimeoutError,
    CheckpointError,
    DamagedCheckpointError,
    HybridflowError,
    WorkerDiedError,
    WorkerError,
)
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Trackers

logger = logging.getLogger("hybridflow")


class Checkpoints:
    """Writes and reads the checkpoints of one run: the state of every role, of the controller, and what belongs to it."""

    def __init__(self, config: Config, launched: Launched, algorithm: Algorithm, rows: RowSource, *, total_steps: int):
        self.config, self.launched, self.algorithm, self.rows = config, launched, algorithm, rows
        self.total_steps = total_steps
        self.store = CheckpointStore(config.run.folder, keep=config.checkpoint.keep, resume=config.checkpoint.resume)
        self.lines_expected: Mapping[str, object] = {}
        """Lines that the files of the run's folder had when the checkpoint was written that the run goes on from."""

    def save(self, step: int, trackers: Trackers) -> Metrics:
        """Write a checkpoint: complete, or absent. A passing failure of the disk is answered by one more attempt. Returns
        what it took.

        Raises:
            CheckpointError: it could not be written.
        """
        started = time.perf_counter()
        try:
            self._write(step, trackers)
        except CheckpointError as error:
            if error.errno not in PASSING:
                raise
            logger.warning("%s\nThat may have passed: the checkpoint is written once more", error)
            time.sleep(RETRY_S)
            self._write(step, trackers)
        return Metrics({"seconds/checkpoint": time.perf_counter() - started})

    def _write(self, step: int, trackers: Trackers) -> None:
        with self.store.writing(step) as folder:
            for role, worker in self.launched.groups.items():
                (folder / role).mkdir()
                worker.save(str(folder / role))
            trackers.flush()
            state = RunState(
                step=step,
                config=as_written(self.config),
                algorithm=self.algorithm.state_dict(),
                stream=self.rows.save(folder / "data"),
                lines={name: num_lines(self.store.run_folder / name) for name in GROWING},
            )
            self.store.write_state(folder, state)
            flush_files(self.store.run_folder)

    def resume(self) -> int:
        """Restore the checkpoint that `checkpoint.resume` means; returns its step, 0 where there is none.

        Raises:
            CheckpointError: the checkpoint is damaged, or of other roles, another model, other data or another algorithm.
        """
        point = resume_point(self.store)
        if point.source is None:
            point.settle()
            return 0
        state = self.store.read_state(point.source)
        changed = changes(state.config, as_written(self.config))
        self._refuse_other_algorithm(point.source, state)
        if other := changes_of_the_policy(changed, has_adapters=self.config.model.lora_rank > 0):
            had_none = any(line.startswith("model.lora_rank: 0 ") for line in other)
            what = "was trained without adapters" if had_none else "has adapters, which are another policy under other settings"
            problem = f"{point.source} {what}."
            raise CheckpointError.advising(problem, advice.other_policy(other))
        try:
            self._restore(point.source, state)
        except (WorkerDiedError, CallTimeoutError):
            raise
        except HybridflowError as error:
            raise self._unfit(point.source, of_model_or_data(changed), error) from error
        point.settle()
        if changed:
            listed = "\n".join(f"  {line}" for line in changed)
            logger.warning("settings that differ from those of %s:\n%s", point.source, listed)
        if point.source.parent == self.store.folder:
            self.lines_expected = state.lines
        logger.info("resumed from %s, after step %d of %d", point.source, state.step, self.total_steps)
        if state.step >= self.total_steps:
            logger.info("nothing is left to train; raise run.total_steps or run.total_epochs to go on")
        return state.step

    def _unfit(self, source: Path, changed: Sequence[str], error: HybridflowError) -> CheckpointError:
        """An error that tells a checkpoint of other things from a damaged one."""
        whole = newest_whole(source.parent, other_than=source)
        if is_damage(error) or (whole and not changed and _roles(whole) != _roles(source)):
            return CheckpointError.advising(f"{source} is damaged: {error}\n", advice.resume_from(source, whole))
        return CheckpointError.advising(f"{source} does not fit this run: {error}\n", advice.for_misfit(changed))

    def _restore(self, source: Path, state: RunState) -> None:
        for role, worker in self.launched.groups.items():
            if not (source / role).is_dir():
                raise CheckpointError(f"it has no state of role '{role}'")
            worker.restore(str(source / role))
        try:
            self.rows.restore(source / "data", state.stream)
            own = {name: float(str(value)) for name, value in state.algorithm.items()}
        except (KeyError, TypeError, ValueError, AssertionError) as error:
            raise DamagedCheckpointError(f"its state.json holds what this version would not write: {error!r}") from error
        if wrong := [name for name, value in own.items() if not math.isfinite(value)]:
            raise DamagedCheckpointError(f"its state.json has {wrong[0]} of the algorithm as {own[wrong[0]]}")
        self.algorithm.load_state_dict(own)

    def _refuse_other_algorithm(self, source: Path, state: RunState) -> None:
        section = state.config.get("algorithm")
        then, now = str(section.get("name")) if isinstance(section, Mapping) else "", self.config.algorithm.name
        if then and then != now:
            problem = f"{source} was written by algorithm {then!r}, not {now!r}."
            raise CheckpointError.advising(problem, advice.other_algorithm(then, now))

    def tell_lost_lines(self) -> None:
        """Say which files of the run's folder have fewer lines than they had when the checkpoint was written."""
        for name, expected in self.lines_expected.items():
            found = num_lines(self.store.run_folder / name)
            if isinstance(expected, int) and found < expected:
                logger.warning("%s has %d of the %d lines that were written before the checkpoint", name, found, expected)


def is_damage(error: HybridflowError) -> bool:
    """Whether a file holds what no run would have written; also where a rank has found that out."""
    if isinstance(error, WorkerError):
        return error.cause.startswith(f"{DamagedCheckpointError.__name__}: ")
    return isinstance(error, DamagedCheckpointError)


def _roles(checkpoint: Path) -> set[str]:
    return {path.name for path in checkpoint.iterdir() if path.is_dir()}


def num_lines(path: Path) -> int:
    """Whole lines of a file; 0 where there is none."""
    try:
        with path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)
    except FileNotFoundError:
        return 0


def flush_files(folder: Path) -> None:
    """Put what a run writes beside its checkpoints on the disk: what a checkpoint is committed after must not be gone
    before it."""
    for path in [*folder.iterdir(), *folder.glob("tensorboard/*")]:
        if path.is_file():
            flush(path)
    for path in (folder, folder / "tensorboard"):
        if path.is_dir():
            flush(path)
