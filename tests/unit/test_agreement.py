"""Differences of log-probabilities between engine and trainer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.ops.agreement import Agreement, log_prob_agreement
from hybridflow.parallel.layout import Layout
from hybridflow.workers.agreement import LogProbAgreement, agreement_metrics
from hybridflow.workers.base import RankContext


def test_equal_log_probs_agree_exactly():
    log_probs = torch.randn(50)
    assert log_prob_agreement(log_probs, log_probs.clone()) == Agreement(0.0, 0.0, 0.0, 0.0, 50)


def test_mean_maximum_and_k3_of_two_tokens():
    # Differences 0.1 and -0.3: mean 0.2, k3 ((e^0.1 - 1 - 0.1) + (e^-0.3 - 1 + 0.3)) / 2.
    found = log_prob_agreement(torch.tensor([-1.0, -2.0]), torch.tensor([-0.9, -2.3]))
    assert found.mean == pytest.approx(0.2, abs=1e-6)
    assert found.max == pytest.approx(0.3, abs=1e-6)
    assert found.k3 == pytest.approx((math.exp(0.1) - 1.1 + math.exp(-0.3) - 0.7) / 2, abs=1e-6)


def test_the_99th_percentile_leaves_out_one_in_a_hundred():
    differences = torch.zeros(200)
    differences[:2] = 5.0
    assert log_prob_agreement(torch.zeros(200), differences).p99 == 0.0
    differences[2] = 1.0
    assert log_prob_agreement(torch.zeros(200), differences).p99 == 1.0


def test_no_tokens_give_zeros():
    assert log_prob_agreement(torch.empty(0), torch.empty(0)) == Agreement(0.0, 0.0, 0.0, 0.0, 0)


def rows_of_rank(*differences: list[float]) -> Batch:
    """What one rank computes for rows whose tokens differ by these much."""
    tokens = np.array([len(row) for row in differences])
    batch = Batch.from_columns(
        {
            "response_tokens": tokens,
            "rollout_log_probs": Ragged.from_rows([[0.0] * len(row) for row in differences], np.float32),
            "log_probs": Ragged.from_rows(list(differences), np.float32),
        }
    )
    context = RankContext(role="actor", rank=0, layout=Layout(), device=torch.device("cpu"))
    return LogProbAgreement()(batch, context).with_columns(response_tokens=tokens)


def test_metrics_over_ranks_are_those_over_all_tokens():
    # Rank 0: |0.1|, |0.2|, |0.3|; rank 1: |0.6|. Mean 0.3, maximum 0.6.
    batch = Batch.concatenate([rows_of_rank([0.1], [-0.2, 0.3]), rows_of_rank([0.6])])
    metrics = agreement_metrics(batch)
    assert metrics["agreement/mean"] == pytest.approx(0.3)
    assert metrics["agreement/max"] == pytest.approx(0.6)
    expected_k3 = sum(math.exp(d) - 1 - d for d in (0.1, -0.2, 0.3, 0.6)) / 4
    assert metrics["agreement/k3"] == pytest.approx(expected_k3, rel=1e-5)
