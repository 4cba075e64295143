"""Validation: generate on the validation prompts with their own sampling, and score."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.controller.batch_metrics import length_metrics, reward_metrics
from hybridflow.controller.launch import Launched
from hybridflow.controller.measures import Answers, Estimate, as_metrics, powers_of_two
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample
from hybridflow.workers.respond import respond, with_model_score
from hybridflow.workers.rollout import validation_sampling
from hybridflow.workers.token_functions import AnswerKeys, CopyObjects


def validate(config: Config, launched: Launched) -> tuple[Metrics, list[Sample]]:
    """Mean reward, the user's metrics and what answers are worth over all validation prompts, and a few samples."""
    rows = answered(config, launched)
    metrics = reward_metrics(rows) + length_metrics(rows)
    metrics += as_metrics(estimates(config, launched, rows, powers_of_two(config.validation.responses_per_prompt)))
    return metrics.prefixed("validation"), _samples(config, launched, rows)


def answered(config: Config, launched: Launched) -> Batch:
    """All validation prompts with their responses, scored.

    The same prompts get the same seeds each time, so two validations of the same weights agree.
    """
    rollout, reward = launched.rollout, launched.reward
    assert rollout is not None and reward is not None, "an algorithm with validation declares rollout and reward"
    rows = launched.data.validation_batch().repeat(config.validation.responses_per_prompt)
    rows = rows.with_columns(call=np.zeros(len(rows), np.int64))
    if config.loop.max_staleness:  # rows of the stream may be under way, which are handed out to others
        rows = rows.join(rollout.generate(rows, sampling=validation_sampling(config)))
        rows = rows.join(reward.score(rows))
    else:
        rows = respond(rows, rollout, reward, sampling=validation_sampling(config))
    return with_model_score(rows, launched.reward_model, weight=config.reward_model.weight)


def estimates(config: Config, launched: Launched, rows: Batch, ks: Sequence[int]) -> dict[str, dict[str, Estimate]]:
    """What the answers are worth, over all prompts and by data source."""
    num_responses = config.validation.responses_per_prompt
    sources = launched.data.compute(rows, CopyObjects(("data_source",))).objects("data_source")
    keys = launched.data.compute(rows, AnswerKeys())["answer_key"] if num_responses > 1 else np.zeros(len(rows), np.int64)
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
