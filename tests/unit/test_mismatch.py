"""Differences of log-probabilities between engine and trainer, and what is reported of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.metrics import Metrics
from hybridflow.ops.mismatch import importance_weights, mismatch
from hybridflow.ops.reduce import to_metrics
from hybridflow.workers.mismatch import entropy_metrics, mismatch_metrics, of_tokens


def found(rollout: list[float], trainer: list[float]) -> Metrics:
    return to_metrics(mismatch(torch.tensor(rollout), torch.tensor(trainer)))


def test_equal_log_probs_agree_exactly() -> None:
    log_probs = torch.randn(50).tolist()
    assert dict(found(log_probs, log_probs)) == {"mean": 0.0, "p99": 0.0, "k3": 0.0, "max": 0.0}


def test_mean_maximum_and_k3_of_two_tokens() -> None:
    # Differences 0.1 and -0.3: mean 0.2, k3 ((e^0.1 - 1 - 0.1) + (e^-0.3 - 1 + 0.3)) / 2.
    metrics = found([-1.0, -2.0], [-0.9, -2.3])
    assert metrics["mean"] == pytest.approx(0.2, abs=1e-6)
    assert metrics["max"] == pytest.approx(0.3, abs=1e-6)
    assert metrics["k3"] == pytest.approx((math.exp(0.1) - 1.1 + math.exp(-0.3) - 0.7) / 2, abs=1e-6)


def test_the_99th_percentile_leaves_out_one_in_a_hundred() -> None:
    assert found([0.0] * 200, [5.0, 5.0, *[0.0] * 198])["p99"] == 0.0
    assert found([0.0] * 200, [5.0, 5.0, 1.0, *[0.0] * 197])["p99"] == 1.0


def test_no_tokens_say_nothing() -> None:
    assert not found([], [])
    assert not mismatch_metrics(rows_of_rank([], []), Ragged.from_rows([[], []], np.float32))


def test_importance_weights_of_two_tokens_give_their_effective_sample_size() -> None:
    # Weights 1 and 3: (1 + 3)^2 / (2 (1 + 9)) = 0.8 of the tokens.
    weights = to_metrics(importance_weights(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0 + math.log(3)])))
    assert weights["weight"] ** 2 / weights["weight_sq"] == pytest.approx(0.8, rel=1e-6)


def test_importance_is_reported_only_where_older_weights_may_have_sampled() -> None:
    log_probs = torch.tensor([-1.0])
    assert not [name for name in of_tokens(log_probs, log_probs, is_stale=False) if name.startswith("importance/")]
    assert {"importance/weight", "importance/weight_sq"} <= set(of_tokens(log_probs, log_probs, is_stale=True))


def rows_of_rank(*differences: list[float], mask: list[list[int]] | None = None) -> Batch:
    """Rows of one rank, whose tokens the engine gave 0 nats."""
    columns = {"rollout_log_probs": Ragged.from_rows([[0.0] * len(row) for row in differences], np.float32)}
    if mask is not None:
        columns["loss_mask"] = Ragged.from_rows(mask, np.bool_)
    return Batch.from_columns(columns)


def test_metrics_over_ranks_are_those_over_all_tokens() -> None:
    # Rank 0: |0.1|, |0.2|, |0.3|; rank 1: |0.6|. Mean 0.3, maximum 0.6.
    parts = [[[0.1], [-0.2, 0.3]], [[0.6]]]
    metrics = Metrics.merged(mismatch_metrics(rows_of_rank(*rows), Ragged.from_rows(rows, np.float32)) for rows in parts)
    assert metrics["mismatch/mean"] == pytest.approx(0.3)
    assert metrics["mismatch/max"] == pytest.approx(0.6)
    expected_k3 = sum(math.exp(d) - 1 - d for d in (0.1, -0.2, 0.3, 0.6)) / 4
    assert metrics["mismatch/k3"] == pytest.approx(expected_k3, rel=1e-5)


def test_tokens_that_the_policy_did_not_sample_count_neither_in_the_mismatch_nor_in_the_entropy() -> None:
    rows, mask = [[0.1, float("nan"), 0.3], [float("inf")]], [[1, 0, 1], [0]]
    batch, column = rows_of_rank(*rows, mask=mask), Ragged.from_rows(rows, np.float32)
    assert mismatch_metrics(batch, column)["mismatch/mean"] == pytest.approx(0.2)
    assert entropy_metrics(batch, column)["actor/entropy"] == pytest.approx(0.2)


def test_log_probabilities_of_a_stale_step_tell_the_weights_that_the_effective_sample_size_is_made_of() -> None:
    # Weights trainer / engine: e^0 and e^ln 3, so their mean is 2 and that of their squares 5.
    batch, log_probs = rows_of_rank([0.0], [0.0]), Ragged.from_rows([[0.0], [math.log(3.0)]], np.float32)
    found = mismatch_metrics(batch, log_probs, is_stale=True)
    assert (found["importance/weight"], found["importance/weight_sq"]) == pytest.approx((2.0, 5.0))
    assert not [name for name in mismatch_metrics(batch, log_probs) if name.startswith("importance/")]
