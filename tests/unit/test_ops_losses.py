"""Losses case by case, and their invariance to how an update is split."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridflow import ops
from tests.reference import losses as reference

LENGTHS = [3, 1, 6, 2]


def batch_of(lengths: list[int], aggregation: ops.Aggregation = "token_mean", **tensors: Tensor) -> ops.TokenBatch:
    """All tensors but the model's outputs are columns."""
    outputs = {name: tensors.pop(name, None) for name in ("log_probs_T", "values_T", "entropy_T")}
    counts = ops.Counts(tokens=sum(lengths), rows=len(lengths))
    lengths_B = torch.tensor(lengths)
    weights_T = ops.token_weights(lengths_B, aggregation=aggregation, counts=counts, max_tokens=8)
    return ops.TokenBatch(**outputs, columns=tensors, lengths_B=lengths_B, weights_T=weights_T)


def one_token(loss: ops.PolicyLoss, ratio: float, advantage: float) -> tuple[float, float]:
    """The loss of one token, and its derivative by the token's log-probability."""
    old_T = torch.tensor([-1.0])
    log_probs_T = (old_T + math.log(ratio)).requires_grad_()
    value, _ = loss(batch_of([1], log_probs_T=log_probs_T, log_probs=old_T, advantages=torch.tensor([advantage])))
    (gradient_T,) = torch.autograd.grad(value, log_probs_T)
    return value.item(), gradient_T.item()


@pytest.mark.parametrize(
    ("clip", "dual_clip", "ratio", "advantage", "expected", "derivative"),
    [
        # The derivative of -r A by log p is -r A where the ratio counts, 0 where a bound counts.
        ((0.2, 0.2), None, 1.5, 2.0, -2.4, 0.0),  # good and already likelier than 1.2: enough
        ((0.2, 0.2), None, 1.1, 2.0, -2.2, -2.2),
        ((0.2, 0.2), None, 0.5, 2.0, -1.0, -1.0),  # good but less likely: no bound
        ((0.2, 0.2), None, 1.5, -2.0, 3.0, 3.0),  # bad but likelier: no bound
        ((0.2, 0.2), None, 0.5, -2.0, 1.6, 0.0),  # bad and already less likely than 0.8: enough
        ((0.2, 0.2), None, 1.5, 0.0, 0.0, 0.0),
        ((0.2, 0.28), None, 1.26, 1.0, -1.26, -1.26),  # the upper bound alone is raised
        ((0.2, 0.28), None, 1.3, 1.0, -1.28, 0.0),
        ((0.1, 0.28), None, 0.85, -1.0, 0.9, 0.0),
        ((0.2, 0.2), 3.0, 5.0, -2.0, 6.0, 0.0),  # bad and five times likelier: counts as three times
        ((0.2, 0.2), 3.0, 2.5, -2.0, 5.0, 5.0),
        ((0.2, 0.2), 3.0, 5.0, 2.0, -2.4, 0.0),  # the second bound is for negative advantages only
        ((0.2, 0.2), 3.0, 0.5, -2.0, 1.6, 0.0),
    ],
)
def test_the_clip_case_by_case(
    clip: tuple[float, float], dual_clip: float | None, ratio: float, advantage: float, expected: float, derivative: float
):
    value, gradient = one_token(ops.PolicyLoss(clip=clip, dual_clip=dual_clip), ratio, advantage)
    assert math.isclose(value, expected, rel_tol=1e-5, abs_tol=1e-9)
    assert math.isclose(gradient, derivative, rel_tol=1e-5, abs_tol=1e-9)
    assert math.isclose(reference.policy_token(ratio, advantage, clip, dual_clip), expected, rel_tol=1e-9, abs_tol=1e-9)


def policy_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old_T = -3.0 * torch.rand(sum(LENGTHS), generator=generator)

    def near_old() -> Tensor:
        return old_T + 0.4 * torch.randn(sum(LENGTHS), generator=generator)

    return {
        "log_probs_T": near_old().requires_grad_(),
        "entropy_T": torch.rand(sum(LENGTHS), generator=generator).requires_grad_(),
        "log_probs": old_T,
        "advantages": torch.randn(sum(LENGTHS), generator=generator),
        "reference_log_probs": near_old(),
        "rollout_log_probs": near_old(),
    }


FULL_LOSS = {
    "clip": (0.2, 0.3),
    "dual_clip": 1.5,
    "entropy_coefficient": 0.1,
    "kl_coefficient": 0.5,
    "correction": ops.ImportanceCorrection(level="sequence", cap=1.2, mask_below=0.5),
    "max_tokens": 8,
}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_random_tokens_give_the_loss_of_the_slow_version(aggregation: ops.Aggregation):
    tensors = policy_tensors()
    loss = ops.PolicyLoss(
        clip=(0.2, 0.3), dual_clip=1.5, entropy_coefficient=0.1, kl_coefficient=0.5, aggregation=aggregation, max_tokens=8
    )
    value, _ = loss(batch_of(LENGTHS, aggregation, **tensors))
    column = {name: tensor.detach().double().tolist() for name, tensor in tensors.items()}
    token_losses = [
        reference.policy_token(math.exp(new - old), advantage, (0.2, 0.3), 1.5)
        - 0.1 * entropy
        + 0.5 * reference.kl(new, other, "k3")
        for new, old, advantage, entropy, other in zip(
            *(column[name] for name in ("log_probs_T", "log_probs", "advantages", "entropy_T", "reference_log_probs")),
            strict=True,
        )
    ]
    rows = [token_losses[sum(LENGTHS[:i]) : sum(LENGTHS[: i + 1])] for i in range(len(LENGTHS))]
    assert math.isclose(value.item(), reference.aggregate(rows, aggregation, 8), rel_tol=1e-4)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_splitting_into_microbatches_changes_neither_gradient_nor_metrics(aggregation: ops.Aggregation):
    loss = ops.PolicyLoss(**FULL_LOSS, aggregation=aggregation)
    tensors = policy_tensors()
    log_probs_T = tensors["log_probs_T"]
    whole = batch_of(LENGTHS, aggregation, **tensors)
    value, metrics = loss(whole)
    (gradient_T,) = torch.autograd.grad(value, log_probs_T)

    totals: dict[str, ops.TokenMetric] = {}
    split_value = torch.zeros(())
    start = 0
    for lengths in (LENGTHS[:1], LENGTHS[1:3], LENGTHS[3:]):
        tokens = slice(start, start := start + sum(lengths))
        part = ops.TokenBatch(
            log_probs_T=log_probs_T[tokens],
            entropy_T=tensors["entropy_T"][tokens],
            columns={name: column[tokens] for name, column in whole.columns.items()},
            lengths_B=torch.tensor(lengths),
            weights_T=whole.weights_T[tokens],
        )
        part_value, part_metrics = loss(part)
        split_value = split_value + part_value
        ops.accumulate(totals, part_metrics)
    (split_gradient_T,) = torch.autograd.grad(split_value, log_probs_T)

    torch.testing.assert_close(split_value, value)
    torch.testing.assert_close(split_gradient_T, gradient_T)
    assert dict(ops.to_metrics(totals)) == pytest.approx(dict(ops.to_metrics(metrics)), rel=1e-6)


def test_metrics_say_what_was_clipped():
    ratio_T = torch.tensor([1.5, 1.1, 0.5, 1.5, 0.5, 4.0, 1.0, 1.0])
    advantages_T = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, 1.0])
    loss = ops.PolicyLoss(clip=(0.2, 0.2), dual_clip=3.0)
    _, metrics = loss(batch_of([8], log_probs_T=ratio_T.log(), log_probs=torch.zeros(8), advantages=advantages_T))
    numbers = ops.to_metrics(metrics)
    assert numbers["clip_fraction_upper"] == 1 / 8  # 1.5 with a positive advantage
    assert numbers["clip_fraction_lower"] == 1 / 8  # 0.5 with a negative one
    assert numbers["clip_fraction"] == 2 / 8
    assert numbers["dual_clip_fraction"] == 1 / 8  # 4.0 with a negative one
    assert numbers["ratio_max"] == pytest.approx(4.0)
    # k3 of KL(old || policy) with r = policy / old: r - 1 - log r.
    assert numbers["approx_kl"] == pytest.approx(np.mean(ratio_T.numpy() - 1 - np.log(ratio_T.numpy())), rel=1e-5)


def test_the_current_policy_as_the_old_one_gives_the_plain_policy_gradient():
    log_probs_T = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = ops.PolicyLoss(old_log_probs="current", advantage="advantage")
    value, metrics = loss(batch_of([2], log_probs_T=log_probs_T, advantage=torch.tensor([3.0, -1.0])))
    value.backward()
    assert loss.columns == ("advantage",)
    assert log_probs_T.grad is not None
    assert log_probs_T.grad.tolist() == [-1.5, 0.5]  # -A / 2 tokens
    assert ops.to_metrics(metrics)["clip_fraction"] == 0.0


def test_over_the_engines_log_probabilities_the_ratio_is_the_importance_weight_and_only_the_mask_is_added():
    mask = ops.ImportanceCorrection(cap=2.0, mask_above=3.0)
    loss = ops.PolicyLoss(old_log_probs="rollout_log_probs", advantage="advantage", clip=(9.0, 9.0), correction=mask)
    log_probs_T = torch.log(torch.tensor([1.5, 4.0])).requires_grad_()  # weights 1.5, kept, and 4, masked
    columns = {"advantage": torch.tensor([3.0, 3.0]), "rollout_log_probs": torch.zeros(2)}
    value, _ = loss(batch_of([2], log_probs_T=log_probs_T, **columns))
    value.backward()
    assert log_probs_T.grad is not None
    assert log_probs_T.grad.tolist() == pytest.approx([-1.5 * 3.0 / 2, 0.0])  # -r A / 2 tokens, once the weight, not squared


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [200.0, -200.0])
def test_an_extreme_ratio_gives_finite_gradients(advantage: float, log_ratio: float):
    log_probs_T = torch.tensor([log_ratio], requires_grad=True)
    loss = ops.PolicyLoss(kl_coefficient=0.1)
    zeros_T = torch.zeros(1)
    columns = {"log_probs": zeros_T, "reference_log_probs": zeros_T, "advantages": torch.tensor([advantage])}
    value, _ = loss(batch_of([1], log_probs_T=log_probs_T, **columns))
    value.backward()
    assert value.isfinite()
    assert log_probs_T.grad is not None
    assert log_probs_T.grad.isfinite().all()


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # Ratios of the tokens: 0.5, 4 | 1.5. Of the responses: 2 | 1.5.
        (ops.ImportanceCorrection(cap=2.0), [0.5, 2.0, 1.5]),
        (ops.ImportanceCorrection(cap=2.0, mask_above=3.0), [0.5, 0.0, 1.5]),
        (ops.ImportanceCorrection(cap=2.0, mask_below=0.9), [0.0, 2.0, 1.5]),
        (ops.ImportanceCorrection(level="sequence", cap=1.8), [1.8, 1.8, 1.5]),
        (ops.ImportanceCorrection(level="sequence", cap=1.8, mask_above=1.9), [0.0, 0.0, 1.5]),
        (ops.importance_correction(None, "token", (0.9, 3.0)), [0.0, 0.0, 1.5]),
    ],
)
def test_the_correction_weighs_tokens_by_the_bounded_ratio_to_the_engine(
    correction: ops.ImportanceCorrection, expected: list[float]
):
    ratio_T = torch.tensor([0.5, 4.0, 1.5])
    rollout_T = torch.tensor([-1.0, -2.0, -0.5])
    weights_T, metrics = correction.weights(rollout_T + ratio_T.log(), rollout_T, torch.tensor([2, 0, 1]))
    torch.testing.assert_close(weights_T, torch.tensor(expected))
    numbers = ops.to_metrics(metrics)
    assert numbers["correction_weight"] == pytest.approx(sum(expected) / 3)
    assert numbers["correction_masked"] == pytest.approx(expected.count(0.0) / 3)


def test_the_correction_weighs_the_surrogate_but_not_the_kl():
    zeros_T = torch.zeros(1)
    columns = {"log_probs": zeros_T, "advantages": torch.ones(1), "reference_log_probs": torch.tensor([0.5])}
    loss = ops.PolicyLoss(kl_coefficient=1.0, kl_estimator="k2", correction=ops.ImportanceCorrection(cap=1.5))
    value, _ = loss(batch_of([1], log_probs_T=zeros_T, rollout_log_probs=torch.tensor([-3.0]), **columns))
    assert value.item() == pytest.approx(-1.5 + 0.125)  # weight 1.5 for e^3, k2 = 0.5^2 / 2


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "derivative"),
    [
        (1.0, 0.0, 2.0, 1.125, 0.0),  # clipped to 0.5: 0.5 * 1.5^2 is the larger, and has no gradient
        (1.0, 0.0, -2.0, 4.5, 3.0),  # moved away from the target: the free error is the larger
        (0.25, 0.0, 2.0, 1.53125, -1.75),  # within the clip both are the same
        (-1.0, 0.0, -2.0, 1.125, 0.0),
    ],
)
def test_the_value_clip_case_by_case(value: float, old: float, target: float, expected: float, derivative: float):
    values_T = torch.tensor([value], requires_grad=True)
    batch = batch_of([1], values_T=values_T, values=torch.tensor([old]), returns=torch.tensor([target]))
    loss, _ = ops.ValueLoss(clip=0.5)(batch)
    (gradient_T,) = torch.autograd.grad(loss, values_T)
    assert (loss.item(), gradient_T.item()) == (expected, derivative)
    assert reference.value_token(value, old, target, 0.5) == expected


def test_without_a_clip_the_value_loss_is_half_the_squared_error():
    loss = ops.ValueLoss(clip=None)
    values_T = torch.tensor([1.0, 5.0], requires_grad=True)
    value, metrics = loss(batch_of([2], values_T=values_T, returns=torch.tensor([0.0, 2.0])))
    assert loss.columns == ("returns",)
    assert value.item() == 0.5 * (1.0 + 9.0) / 2
    assert "clip_fraction" not in metrics


def test_explained_variance_is_that_of_all_tokens_however_they_were_split():
    generator = torch.Generator().manual_seed(0)
    returns_T = 100.0 + torch.randn(60, generator=generator)
    values_T = returns_T + 0.5 * torch.randn(60, generator=generator)
    totals: dict[str, ops.TokenMetric] = {}
    for tokens in (slice(0, 7), slice(7, 60)):
        batch = batch_of([len(values_T[tokens])], values_T=values_T[tokens], returns=returns_T[tokens])
        ops.accumulate(totals, ops.ValueLoss(clip=None)(batch)[1])
    returns, errors = returns_T.double().numpy(), (returns_T - values_T).double().numpy()
    expected = 1.0 - np.var(errors) / np.var(returns)
    metrics = ops.to_metrics(totals).prefixed("critic")
    assert ops.explained_variance(metrics, "critic/") == pytest.approx(expected, rel=1e-6)


def test_explained_variance_of_constant_returns_is_not_a_number():
    batch = batch_of([3], values_T=torch.tensor([1.0, 2.0, 3.0]), returns=torch.full((3,), 0.1))
    assert math.isnan(ops.explained_variance(ops.to_metrics(ops.ValueLoss(clip=None)(batch)[1])))


def test_the_next_token_loss_is_the_mean_negative_log_probability():
    log_probs_T = torch.tensor([-1.0, -2.0, -6.0], requires_grad=True)
    value, metrics = ops.NextTokenLoss()(batch_of([2, 1], log_probs_T=log_probs_T))
    assert value.item() == pytest.approx(3.0)
    assert ops.to_metrics(metrics)["loss"] == pytest.approx(3.0)


def test_a_loss_reads_the_columns_that_its_options_need():
    assert ops.PolicyLoss().columns == ("advantages", "log_probs")
    full = ops.PolicyLoss(**FULL_LOSS, advantage="advantage", old_log_probs="current")
    assert full.columns == ("advantage", "reference_log_probs", "rollout_log_probs")
    assert dataclasses.replace(full, correction=None).columns == ("advantage", "reference_log_probs")
    assert full.needs_entropy


@pytest.mark.parametrize("loss", [ops.PolicyLoss(**FULL_LOSS), ops.ValueLoss(clip=None), ops.NextTokenLoss()])
def test_losses_travel_as_values(loss: ops.Loss):
    assert pickle.loads(pickle.dumps(loss)) == loss


@pytest.mark.parametrize(
    ("new", "advantage", "divergence", "loss"),
    [
        # From 0.5 to 0.8: moved up by 0.3, and KL(0.5 || 0.8) = 0.5 log(0.5 / 0.8) + 0.5 log(0.5 / 0.2) = 0.2231.
        (0.8, 1.0, "tv", 0.0),
        (0.8, 1.0, "kl", 0.0),
        # Against the advantage nothing is left: -(0.8 / 0.5) * -1 * log 0.8.
        (0.8, -1.0, "tv", 1.6 * math.log(0.8)),
        # To 0.3: moved down by 0.2, within 0.25, and KL(0.5 || 0.3) = 0.0872.
        (0.3, -1.0, "tv", 0.6 * math.log(0.3)),
        (0.3, -1.0, "kl", 0.6 * math.log(0.3)),
    ],
)
def test_a_token_that_has_left_the_trust_region_counts_nothing(new: float, advantage: float, divergence: str, loss: float):
    log_probs_T = torch.tensor([new]).log().requires_grad_()
    tokens = ops.PolicyTokens(
        log_probs_T=log_probs_T,
        old_T=torch.tensor([0.5]).log(),
        advantage_T=torch.tensor([advantage]),
        lengths_B=torch.tensor([1]),
    )
    bounds = {"tv": (0.25, 0.25), "kl": (0.1, 0.2)}[divergence]
    found_T, _ = ops.within_divergence(tokens, divergence=divergence, bounds=bounds, cap=20.0)  # type: ignore[arg-type]
    assert found_T.item() == pytest.approx(loss, abs=1e-6)
    found_T.sum().backward()
    assert log_probs_T.grad.item() == pytest.approx(loss / math.log(new), abs=1e-6)
