"""KL estimators in exact expectation over a small vocabulary, and the controllers by hand."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from hybridflow import ops
from tests.reference import losses as reference

KINDS: tuple[Literal["k1", "k2", "k3"], ...] = ("k1", "k2", "k3")


def two_policies(distance: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of 50 tokens under two policies."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(50, generator=generator, dtype=torch.float64)
    other_V = logits_V + distance * torch.randn(50, generator=generator, dtype=torch.float64)
    return logits_V.log_softmax(0), other_V.log_softmax(0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("distance", [0.1, 2.0])
def test_k1_and_k3_are_unbiased(kind: Literal["k1", "k3"], distance: float):
    policy_V, reference_V = two_policies(distance)
    expected = (policy_V.exp() * (policy_V - reference_V)).sum()
    torch.testing.assert_close((policy_V.exp() * ops.kl_estimate(policy_V, reference_V, kind)).sum(), expected)


def test_k2_is_nearly_unbiased_where_the_policies_are_close():
    policy_V, reference_V = two_policies(0.05)
    expected = (policy_V.exp() * (policy_V - reference_V)).sum()
    estimate = (policy_V.exp() * ops.kl_estimate(policy_V, reference_V, "k2")).sum()
    torch.testing.assert_close(estimate, expected, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("kind", ["k2", "k3"])
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 30.0])
def test_k2_and_k3_are_never_negative_in_float32(kind: Literal["k2", "k3"], scale: float):
    difference_T = scale * torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    estimate_T = ops.kl_estimate(torch.zeros(10_000), difference_T, kind)
    assert estimate_T.min() >= 0.0
    assert estimate_T.isfinite().all()


def test_k1_of_a_token_that_became_less_likely_is_negative():
    assert ops.kl_estimate(torch.tensor([-2.0]), torch.tensor([-1.0]), "k1").item() == -1.0


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_those_of_the_definition(kind: Literal["k1", "k2", "k3"]):
    log_probs, references = [-1.0, -0.5, -3.0], [-1.5, -0.1, -3.0]
    expected_T = torch.tensor([reference.kl(p, q, kind) for p, q in zip(log_probs, references, strict=True)])
    torch.testing.assert_close(ops.kl_estimate(torch.tensor(log_probs), torch.tensor(references), kind), expected_T)


@pytest.mark.parametrize(
    ("observed", "factor"),
    [
        (0.02, 1.02),  # twice the target: the error of 1 is cut to 0.2, times 100 rows / 1,000
        (0.011, 1.01),  # error 0.1
        (0.01, 1.0),
        (0.0, 0.98),
        (-0.5, 0.98),  # k1 may be negative
    ],
)
def test_the_adaptive_coefficient_moves_towards_its_target(observed: float, factor: float):
    kl = ops.AdaptiveKL(0.1, 0.01, 1000.0)
    kl.update(observed, 100)
    assert math.isclose(kl.coefficient, 0.1 * factor, rel_tol=1e-9)


def test_a_restored_controller_continues():
    kl, restored = ops.AdaptiveKL(0.1, 0.01, 1000.0), ops.AdaptiveKL(0.1, 0.01, 1000.0)
    kl.update(1.0, 64)
    restored.load_state_dict(kl.state_dict())
    assert restored.coefficient == kl.coefficient != 0.1


def test_the_fixed_coefficient_stays():
    kl = ops.FixedKL(0.1)
    kl.update(5.0, 100)
    kl.load_state_dict(kl.state_dict())
    assert kl.coefficient == 0.1


def test_low_var_kl_of_a_token_that_is_far_off_is_ten():
    # e^5 - 1 - 5 = 142.4 and e^-15 - 1 + 15 = 14.0; e^-8 - 1 + 8 = 7.0003 and e^2 - 1 - 2 = 4.389 are below the bound.
    reference_T = torch.tensor([5.0, -15.0, -8.0, 2.0])
    found_T = ops.kl_estimate(torch.zeros(4), reference_T, "low_var_kl")
    assert found_T.tolist() == pytest.approx([10.0, 10.0, 7.000335463, 4.389056099], rel=1e-6)
