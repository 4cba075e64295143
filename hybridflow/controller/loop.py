"""The loop: prompts, collect, learn, sync, validate, save. It knows no algorithm by name."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.checkpoint.changes import changes
from hybridflow.checkpoint.store import CheckpointStore, RunState
from hybridflow.config.schema import Config
from hybridflow.controller.batch_metrics import length_metrics, num_tokens, reward_metrics
from hybridflow.controller.boundary import phase
from hybridflow.controller.launch import Launched
from hybridflow.controller.row_source import RowSource
from hybridflow.controller.validation import validate
from hybridflow.controller.weights import WeightSync
from hybridflow.errors import CheckpointError
from hybridflow.metrics import Metric, Metrics
from hybridflow.trackers.base import Trackers
from hybridflow.workers.remote import Future

logger = logging.getLogger("hybridflow")

OnStep = Callable[[int, Mapping[str, float]], object]


class Loop:
    """One run over launched groups."""

    def __init__(self, config: Config, launched: Launched, algorithm: Algorithm, *, total_steps: int):
        self.config, self.launched, self.algorithm, self.total_steps = config, launched, algorithm, total_steps
        self.store = CheckpointStore(config.run.folder, keep=config.checkpoint.keep)
        self.weights = WeightSync(launched, lets_sleep=launched.engine_sleeps)
        self.rows = RowSource(config, launched, algorithm, total_steps=total_steps)
        self.seconds_saving = Metrics()
        self.saving: Future[None] | None = None
        """The rollouts of the last step, as they are written."""

    def run(self, on_step: OnStep = lambda step, metrics: None) -> None:
        """Train from the newest checkpoint, or from the start, to the last step, or to one after which `on_step(step, metrics)`
        returns False; 0 is the validation before the first."""
        with phase("the run was resumed"):
            last_step = self.resume()
        trackers = Trackers(self.config, total_steps=self.total_steps, resume_step=last_step)
        try:
            if last_step == 0 and self.config.validation.before_training:
                validated = self.validate(0, trackers)
                trackers.log(0, validated)
                on_step(0, validated)
            for step in range(last_step + 1, self.total_steps + 1):
                with phase(f"step {step} was taken"):
                    metrics = self.seconds_saving + self.step(step)
                self.seconds_saving = Metrics()
                if self.is_due(step, self.config.validation.every_steps, and_last=self.config.validation.every_steps > 0):
                    metrics += self.validate(step, trackers)
                with phase(f"the metrics of step {step} were written"):
                    trackers.log(step, metrics)
                is_over = on_step(step, metrics) is False
                save_last = self.config.checkpoint.save_last
                if (is_over and save_last) or self.is_due(step, self.config.checkpoint.every_steps, and_last=save_last):
                    with phase(f"the checkpoint of step {step} was written"):
                        self.save(step)
                if is_over:
                    break
            if self.saving is not None:
                self.saving.result()
        finally:
            self.rows.close()
            trackers.close()

    def step(self, step: int) -> Metrics:
        """One step: rows in, updates made, metrics out."""
        started = time.perf_counter()
        self.launched.log.drain()
        self.algorithm.step = step
        begun = [worker.begin_step.start(step, self.total_steps) for worker in self.launched.groups.values()]
        synced = self.weights.sync(version=step - 1)
        batch, streamed = self.rows.take(step)
        self.weights.sleep()
        self.save_rollouts(step, batch)
        learned = self.algorithm.learn(batch)
        for call in begun:
            call.result()  # long done; what a role raised there is raised here
        seconds = time.perf_counter() - started
        measured = self.launched.log.drain().without(learned)  # a loss with an entropy of its own has seen every update
        measured = Metrics.merged([learned, synced, measured, *batch_metrics(batch, seconds)])
        return self.rows.metrics(measured, streamed, seconds=seconds)

    def save_rollouts(self, step: int, rows: Batch) -> None:
        """Have the data role write what was answered, while the step goes on."""
        wanted = self.config.trackers.save_rollouts
        if wanted == "none" or self.algorithm.rows != "prompts":
            return
        chosen = rows if isinstance(wanted, str) else rows.select(np.arange(min(wanted, len(rows))))
        if self.saving is not None:
            self.saving.result()
        self.saving = self.launched.data.write_rows.start(chosen, str(Path(self.config.run.folder, f"rollouts/{step}.parquet")))

    def validate(self, step: int, trackers: Trackers) -> Metrics:
        """Validate, if there is something to validate on; samples go to the trackers at once."""
        held_out = self.measure_held_out()
        if not self.config.data.validation_files or self.launched.rollout is None:
            return held_out
        started = time.perf_counter()
        with phase(f"the validation after step {step} was made"):
            self.weights.sync(version=step)
            metrics, samples = validate(self.config, self.launched)
        trackers.log_samples(step, samples)
        return held_out + metrics + Metrics({"seconds/validation": time.perf_counter() - started})

    def measure_held_out(self) -> Metrics:
        """`held_out/...`: what the algorithm measures of `data.held_out_files`."""
        if not self.config.data.held_out_files:
            return Metrics()
        found = self.algorithm.measure(self.launched.data.held_out_batch())
        return Metrics.merged(found.renamed(f"{role}/", "held_out/") for role in self.algorithm.trained_roles)

    def save(self, step: int) -> None:
        """Write a checkpoint: complete, or absent. What it takes is logged with the next step."""
        started = time.perf_counter()
        with self.store.writing(step) as folder:
            for role, worker in self.launched.groups.items():
                (folder / role).mkdir()
                worker.save(str(folder / role))
            state = RunState(
                step=step,
                config=dataclasses.asdict(self.config),
                algorithm=self.algorithm.state_dict(),
                stream=self.rows.save(folder / "data"),
            )
            self.store.write_state(folder, state)
        self.seconds_saving = Metrics({"seconds/checkpoint": time.perf_counter() - started})

    def resume(self) -> int:
        """Restore the checkpoint that `checkpoint.resume` names; returns its step, 0 where there is none.

        Raises:
            CheckpointError: the checkpoint is damaged, or of other roles, another model or another algorithm.
        """
        source = self.resume_source()
        if source is None:
            return 0
        self.store.verify(source)
        state = self.store.read_state(source)
        self.compare_settings(source, state)
        for role, worker in self.launched.groups.items():
            if not (source / role).is_dir():
                raise CheckpointError(
                    f"{source} has no state of role '{role}'; it was written by a run with other roles. To start from its "
                    "weights alone, export them and give that folder as the model's path"
                )
            worker.restore(str(source / role))
        self.rows.restore(source / "data", state.stream)
        self.algorithm.load_state_dict({name: float(str(value)) for name, value in state.algorithm.items()})
        logger.info("resumed from %s, after step %d of %d", source, state.step, self.total_steps)
        if state.step >= self.total_steps:
            logger.info("nothing is left to train; raise run.total_steps or run.total_epochs to go on")
        return state.step

    def compare_settings(self, source: Path, state: RunState) -> None:
        """Say which settings are others than those of the checkpoint.

        Raises:
            CheckpointError: it holds the state of another algorithm.
        """
        section = state.config.get("algorithm")
        written_by = section.get("name") if isinstance(section, Mapping) else None
        if state.algorithm and written_by != self.config.algorithm.name:
            raise CheckpointError(
                f"{source} was written by algorithm {written_by!r}, whose {', '.join(state.algorithm)} means nothing to "
                f"{self.config.algorithm.name!r}. Resume with the algorithm of then; or export the weights and start from them"
            )
        if lines := changes(state.config, dataclasses.asdict(self.config)):
            logger.warning("settings that differ from those of %s:\n%s", source, "\n".join(f"  {line}" for line in lines))

    def resume_source(self) -> Path | None:
        """The checkpoint that `checkpoint.resume` names, None where there is none. Others are not looked at."""
        match self.config.checkpoint.resume:
            case "auto":
                return self.store.latest()
            case "never":
                return None
            case path:
                return Path(path)

    def is_due(self, step: int, every_steps: int, *, and_last: bool) -> bool:
        """Whether something that happens every `every_steps` steps (0: never) is due after `step`."""
        return (and_last and step == self.total_steps) or (every_steps > 0 and step % every_steps == 0)


def batch_metrics(batch: Batch, seconds: float) -> list[Metrics]:
    """What the step's rows say without a look at their tokens, and how fast they went."""
    speed = {"seconds/step": Metric(seconds), "tokens_per_second": Metric(num_tokens(batch) / seconds)}
    return [reward_metrics(batch), length_metrics(batch), Metrics(speed)]
