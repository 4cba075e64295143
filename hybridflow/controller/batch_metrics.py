"""Metrics of a batch from its per-row columns alone."""

from __future__ import annotations

import numpy as np

from hybridflow.batch import Batch
from hybridflow.metrics import Metric, Metrics


def reward_metrics(batch: Batch) -> Metrics:
    """`reward/...`: mean and standard deviation, failures, and the mean of each metric of the user's function or, under
    `environment/...`, environment."""
    if "reward" not in batch:
        return Metrics()
    reward = batch["reward"].astype(np.float64)
    metrics = {"reward/mean": _mean(reward), "reward/std": Metric(float(reward.std()))}
    if "reward_failed" in batch:
        metrics["reward/failed"] = Metric(float(batch["reward_failed"].sum()), kind="sum")
    for name in batch.per_row:
        if name.startswith(("reward/", "environment/")):
            metrics[name] = _mean(batch[name].astype(np.float64))
    return Metrics(metrics)


def length_metrics(batch: Batch) -> Metrics:
    """`prompt/...` and `response/...`: tokens per row, those of responses that the policy sampled, and the share of responses
    that hit the length limit."""
    metrics = {"prompt/tokens_mean": _mean(batch["prompt_tokens"])}
    if "response_tokens" in batch:
        sampled = batch["loss_tokens" if "loss_tokens" in batch else "response_tokens"]
        metrics["response/tokens_mean"] = _mean(sampled)
        metrics["response/tokens_max"] = Metric(float(sampled.max(initial=0)), kind="max")
    if "truncated" in batch:
        metrics["response/truncated"] = _mean(batch["truncated"])
    return Metrics(metrics)


def success_rates(batch: Batch, correct_reward: float) -> Batch:
    """For each prompt, `prompt_id` and the share of its responses with at least this reward, `rate`.

    Example:
        >>> rows = Batch({"prompt_id": np.array([7, 7, 9]), "reward": np.array([1.0, 0.0, 1.0])})
        >>> success_rates(rows, correct_reward=1.0)["rate"]
        array([0.5, 1. ])
    """
    prompts, of_row = np.unique(batch["prompt_id"], return_inverse=True)
    correct = (batch["reward"] >= correct_reward - 1e-6).astype(np.float64)
    return Batch({"prompt_id": prompts, "rate": np.bincount(of_row, weights=correct) / np.bincount(of_row)})


def num_tokens(batch: Batch) -> int:
    """Prompt and response tokens of all rows."""
    response = int(batch["response_tokens"].sum()) if "response_tokens" in batch else 0
    return int(batch["prompt_tokens"].sum()) + response


def _mean(column: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Metric:
    """Over the rows that have a value: a metric that a reward function left out is not a number."""
    values = column.astype(np.float64)
    known = values[~np.isnan(values)]
    return Metric(float(known.sum()), float(len(known)))
