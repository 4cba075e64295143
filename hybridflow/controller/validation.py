"""Validation: generate on the validation prompts with their own sampling, and score."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.controller.batch_metrics import length_metrics, reward_metrics
from hybridflow.controller.launch import Launched
from hybridflow.controller.measures import Answers, Estimate, as_metrics, powers_of_two
from hybridflow.controller.weights import WeightSync
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Trackers
from hybridflow.trackers.jsonl import read_lines
from hybridflow.workers.respond import respond, with_model_score
from hybridflow.workers.rollout import RolloutWorker, validation_sampling
from hybridflow.workers.token_functions import CopyObjects, answer_keys


class Validation:
    """Validation between two steps, by the engines of training."""

    def __init__(self, config: Config, launched: Launched, weights: WeightSync, trackers: Trackers):
        self.config, self.launched, self.weights, self.trackers = config, launched, weights, trackers

    def run(self, step: int) -> Metrics:
        """Validate the weights after `step`; samples go to the trackers at once, metrics are returned."""
        self.weights.sync(version=step)
        assert self.launched.rollout is not None
        metrics, samples = validate(self.config, self.launched, self.launched.rollout)
        self.trackers.log_samples(step, samples)
        return metrics

    def run_again(self, step: int) -> None:
        """After a resume at `step`: what had been lost of its validation is made up for. Here nothing can be lost."""

    def log_if_done(self) -> None:
        """Log what has ended meanwhile."""

    def finish(self, *, before: float = math.inf) -> None:
        """Wait for a validation of a step before `before`, and log it."""

    def close(self) -> None:
        """The run has ended, or failed."""


class ConcurrentValidation(Validation):
    """Validation beside training, by engines of its own. One at a time; what it finds is logged under the step whose weights
    it used, some steps later."""

    def __init__(self, config: Config, launched: Launched, trackers: Trackers):
        weights = WeightSync(launched, engines=launched.validation, role="validation")
        super().__init__(config, launched, weights, trackers)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hybridflow-validation")
        self._step = 0
        self._running: Future[tuple[Metrics, list[Sample]]] | None = None

    def run(self, step: int) -> Metrics:
        self.finish()
        self.weights.sync(version=step)
        assert self.launched.validation is not None
        self._step = step
        self._running = self._thread.submit(validate, self.config, self.launched, self.launched.validation)
        return Metrics()

    def run_again(self, step: int) -> None:
        lines = read_lines(Path(self.config.run.folder) / "metrics.jsonl")
        if not any(line["step"] == step and any(name.startswith("validation/") for name in line) for line in lines):
            self.run(step)

    def log_if_done(self) -> None:
        if self._running is not None and self._running.done():
            self.finish()

    def finish(self, *, before: float = math.inf) -> None:
        if self._running is not None and self._step < before:
            metrics, samples = self._running.result()
            self._running = None
            self.trackers.log_samples(self._step, samples)
            self.trackers.log(self._step, metrics)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def validate(config: Config, launched: Launched, rollout: RolloutWorker) -> tuple[Metrics, list[Sample]]:
    """Mean reward, the user's metrics and what answers are worth over all validation prompts, and a few samples."""
    started = time.perf_counter()
    rows = answered(config, launched, rollout)
    metrics = reward_metrics(rows) + length_metrics(rows)
    metrics += as_metrics(estimates(config, launched, rows, powers_of_two(config.validation.responses_per_prompt)))
    metrics = metrics.prefixed("validation")
    return metrics + Metrics({"seconds/validation": time.perf_counter() - started}), _samples(config, launched, rows)


def answered(config: Config, launched: Launched, rollout: RolloutWorker | None) -> Batch:
    """All validation prompts with their responses by `rollout`, scored.

    The same prompts get the same seeds each time, so two validations of the same weights agree.
    """
    reward = launched.reward
    assert rollout is not None and reward is not None, "an algorithm with validation declares rollout and reward"
    rows = launched.data.validation_batch().repeat(config.validation.responses_per_prompt)
    rows = rows.with_columns(call=np.zeros(len(rows), np.int64))
    # Rows of the stream may be under way, which are handed out to others; and another thread must not hold up calls.
    if config.loop.max_staleness or config.validation.concurrent:
        rows = rows.join(rollout.generate(rows, sampling=validation_sampling(config)))
        rows = rows.join(reward.score(rows))
    else:
        rows = respond(rows, rollout, reward, sampling=validation_sampling(config))
    return with_model_score(rows, launched.reward_model, weight=config.reward_model.weight)


def estimates(config: Config, launched: Launched, rows: Batch, ks: Sequence[int]) -> dict[str, dict[str, Estimate]]:
    """What the answers are worth, over all prompts and by data source."""
    num_responses = config.validation.responses_per_prompt
    sources = launched.data.compute(rows, CopyObjects(("data_source",))).objects("data_source")
    keys = launched.data.compute(rows, answer_keys)["answer_key"] if num_responses > 1 else np.zeros(len(rows), np.int64)
    answers = Answers(
        rewards=rows["reward"].astype(np.float64),
        answers=keys,
        sources=[str(source or "unnamed") for source in sources],
        responses_per_prompt=num_responses,
        correct_reward=config.validation.correct_reward,
    )
    return answers.estimates(ks)


def _samples(config: Config, launched: Launched, rows: Batch) -> list[Sample]:
    stride = config.validation.responses_per_prompt
    chosen = rows.select(np.arange(0, len(rows), stride)[: config.validation.num_samples_logged])
    texts = launched.data.compute(chosen, CopyObjects(("prompt_text", "response_text", "ground_truth")))
    columns = [texts.objects(name) for name in ("prompt_text", "response_text", "ground_truth")]
    return [
        Sample(prompt=str(prompt), response=str(response), ground_truth=str(truth), reward=float(value))
        for prompt, response, truth, value in zip(*columns, chosen["reward"], strict=True)
    ]
