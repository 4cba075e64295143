"""Differences of log-probabilities between engine and trainer."""

from __future__ import annotations

import math

import pytest
import torch

from hybridflow.ops.agreement import Agreement, agreement


def test_equal_log_probs_agree_exactly():
    log_probs = torch.randn(50)
    assert agreement(log_probs, log_probs.clone()) == Agreement(0.0, 0.0, 0.0, 0.0, 50)


def test_mean_maximum_and_k3_of_two_tokens():
    # Differences 0.1 and -0.3: mean 0.2, k3 ((e^0.1 - 1 - 0.1) + (e^-0.3 - 1 + 0.3)) / 2.
    found = agreement(torch.tensor([-1.0, -2.0]), torch.tensor([-0.9, -2.3]))
    assert found.mean == pytest.approx(0.2, abs=1e-6)
    assert found.max == pytest.approx(0.3, abs=1e-6)
    assert found.k3 == pytest.approx((math.exp(0.1) - 1.1 + math.exp(-0.3) - 0.7) / 2, abs=1e-6)


def test_the_99th_percentile_leaves_out_one_in_a_hundred():
    differences = torch.zeros(200)
    differences[:2] = 5.0
    assert agreement(torch.zeros(200), differences).p99 == 0.0
    differences[2] = 1.0
    assert agreement(torch.zeros(200), differences).p99 == 1.0


def test_no_tokens_give_zeros():
    assert agreement(torch.empty(0), torch.empty(0)) == Agreement(0.0, 0.0, 0.0, 0.0, 0)
