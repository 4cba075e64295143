"""The loop: prompts, collect, learn, sync, validate, save. It knows no algorithm by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.controller.batch_metrics import length_metrics, num_tokens, reward_metrics, success_rates
from hybridflow.controller.checkpoints import Checkpoints
from hybridflow.controller.cut_off import CutOffWarning
from hybridflow.controller.launch import Launched
from hybridflow.controller.row_source import RowSource
from hybridflow.controller.run_folder import RunFolder
from hybridflow.controller.validation import ConcurrentValidation, Validation
from hybridflow.controller.weights import WeightSync
from hybridflow.ending import phase
from hybridflow.errors import HybridflowError
from hybridflow.metrics import Metric, Metrics
from hybridflow.trackers.base import Trackers
from hybridflow.trackers.timeline import TimelineFile
from hybridflow.workers.remote import Future, returned

OnStep = Callable[[int, Mapping[str, float]], object]


class Loop:
    """One run over launched groups."""

    def __init__(self, config: Config, launched: Launched, algorithm: Algorithm, folder: RunFolder):
        self.config, self.launched, self.algorithm = config, launched, algorithm
        total_steps = config.run.total_steps or config.run.total_epochs * launched.dataset.steps_per_epoch
        self.total_steps = total_steps
        self.folder = folder
        self.weights = WeightSync(
            launched,
            engines=launched.rollout,
            lets_sleep=launched.engine_sleeps,
            verifies=config.rollout.verify_weights,
        )
        self.rows = RowSource(config, launched, algorithm, total_steps=total_steps)
        self.checkpoints = Checkpoints(config, launched, algorithm, self.rows, total_steps=total_steps)
        self.seconds_saving = Metrics()
        is_sampled, turns = algorithm.rows == "prompts", config.environment.max_turns
        self.cut_off = CutOffWarning(config.data.max_response_tokens, max_turns=turns, is_sampled=is_sampled)
        self.saving: Future[None] | None = None
        """The rollouts of the last step, as they are written."""

    def run(self, on_step: OnStep = lambda step, metrics: None) -> None:
        """Train from the newest checkpoint, or from the start, to the last step, or to one after which `on_step(step, metrics)`
        returns False; 0 is the validation before the first.

        Raises:
            RunFolderError: the folder was removed, replaced or taken meanwhile, whatever failed on account of that.
        """
        try:
            self._run(on_step)
        except (HybridflowError, OSError):
            self.folder.check()
            raise
        self.folder.check()

    def _run(self, on_step: OnStep) -> None:
        with phase("the run was resumed"):
            last_step = self.checkpoints.resume()
            self.launched.keep_plan()
        trackers = Trackers(self.config, total_steps=self.total_steps, resume_step=last_step)
        self.checkpoints.tell_lost_lines()
        timeline = TimelineFile(Path(self.config.run.folder), resume_step=last_step)
        validation = self.validation(trackers)
        try:
            if last_step and self.is_validated(last_step):
                validation.run_again(last_step)
            if last_step == 0 and self.config.validation.before_training:
                validated = self.validate(0, validation)
                trackers.log(0, validated)
                on_step(0, validated)
            for step in range(last_step + 1, self.total_steps + 1):
                with phase(f"step {step} was taken"):
                    metrics = self.seconds_saving + self.step(step)
                self.seconds_saving = Metrics()
                validation.log_if_done()
                if self.is_validated(step):
                    metrics += self.validate(step, validation)
                self.folder.check()
                with phase(f"the metrics of step {step} were written"):
                    trackers.log(step, metrics)
                    timeline.write(step, self.launched.log.take_spans())
                is_over = on_step(step, metrics) is False
                save_last = self.config.checkpoint.save_last
                if (is_over and save_last) or self.is_due(step, self.config.checkpoint.every_steps, and_last=save_last):
                    validation.finish(before=step)  # one of this very step is run again where the run is resumed
                    if self.saving is not None:
                        self.saving.result()
                    with phase(f"the checkpoint of step {step} was written"):
                        self.seconds_saving = self.checkpoints.save(step, trackers)
                if is_over:
                    break
            validation.finish()
            if self.saving is not None:
                self.saving.result()
        finally:
            validation.close()
            self.rows.close()
            trackers.close()
            timeline.close()

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
        if self.config.data.curriculum is not None and "reward" in batch:
            self.launched.data.note_success(success_rates(batch, self.config.validation.correct_reward))
        learned = returned(self.algorithm.learn(batch), Metrics, f"{type(self.algorithm).__name__}.learn")
        for call in begun:
            call.result()  # long done; what a role raised there is raised here
        if step == self.total_steps:
            for ended in [worker.end_run.start() for worker in self.launched.groups.values()]:
                ended.result()
        self.cut_off.look(step, batch)
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

    def validation(self, trackers: Trackers) -> Validation:
        """By the engines of training, or by those of its own."""
        if self.launched.validation is not None:
            return ConcurrentValidation(self.config, self.launched, trackers)
        return Validation(self.config, self.launched, self.weights, trackers)

    def validate(self, step: int, validation: Validation) -> Metrics:
        """Validate, if there is something to validate on; samples go to the trackers at once."""
        held_out = self.measure_held_out()
        if not self.config.data.validation_files or self.launched.rollout is None:
            return held_out
        with phase(f"the validation after step {step} was made"):
            return held_out + validation.run(step)

    def is_validated(self, step: int) -> bool:
        """Whether the weights after a step are validated."""
        every_steps = self.config.validation.every_steps
        return self.is_due(step, every_steps, and_last=every_steps > 0)

    def measure_held_out(self) -> Metrics:
        """`held_out/...`: what the algorithm measures of `data.held_out_files`."""
        if not self.config.data.held_out_files:
            return Metrics()
        found = self.algorithm.measure(self.launched.data.held_out_batch())
        return Metrics.merged(found.renamed(f"{role}/", "held_out/") for role in self.algorithm.trained_roles)

    def is_due(self, step: int, every_steps: int, *, and_last: bool) -> bool:
        """Whether something that happens every `every_steps` steps (0: never) is due after `step`."""
        return (and_last and step == self.total_steps) or (every_steps > 0 and step % every_steps == 0)


def batch_metrics(batch: Batch, seconds: float) -> list[Metrics]:
    """What the step's rows say without a look at their tokens, and how fast they went."""
    speed = {"seconds/step": Metric(seconds), "tokens_per_second": Metric(num_tokens(batch) / seconds)}
    return [reward_metrics(batch), length_metrics(batch), Metrics(speed)]
