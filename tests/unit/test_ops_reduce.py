"""Counts are divided by once, and metrics merge to what the whole would have given."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from hybridflow import ops
from tests.reference import losses as reference

LENGTHS = [3, 1, 6, 2]
MAX_TOKENS = 8
AGGREGATIONS: tuple[ops.Aggregation, ...] = ("token_mean", "sequence_mean", "sequence_sum")


def weights(lengths: list[int], aggregation: ops.Aggregation) -> torch.Tensor:
    counts = ops.Counts(tokens=sum(LENGTHS), rows=len(LENGTHS))
    return ops.token_weights(torch.tensor(lengths), aggregation=aggregation, counts=counts, max_tokens=MAX_TOKENS)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weighted_token_losses_add_up_to_the_aggregate(aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"]):
    loss_T = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    rows = [row.tolist() for row in loss_T.split(LENGTHS)]
    expected = reference.aggregate(rows, aggregation, MAX_TOKENS)
    assert math.isclose((loss_T * weights(LENGTHS, aggregation)).sum().item(), expected, rel_tol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_the_weight_of_a_token_does_not_depend_on_the_microbatch(aggregation: ops.Aggregation, cut: int):
    parts = torch.cat([weights(LENGTHS[:cut], aggregation), weights(LENGTHS[cut:], aggregation)])
    assert torch.equal(parts, weights(LENGTHS, aggregation))


def test_an_empty_row_has_no_weights_and_changes_no_other_row():
    assert torch.equal(weights([3, 0, 2], "sequence_mean"), weights([3, 2], "sequence_mean"))


def test_a_constant_length_must_be_given_where_it_divides():
    with pytest.raises(AssertionError, match="max_tokens"):
        ops.token_weights(torch.tensor([1]), aggregation="sequence_sum", counts=ops.Counts(tokens=1, rows=1))


def metrics_of(values_T: torch.Tensor) -> dict[str, ops.TokenMetric]:
    return {
        "mean": ops.TokenMetric.mean(values_T),
        "share": ops.TokenMetric.mean(values_T > 2.0),
        "sum": ops.TokenMetric.sum(values_T),
        "max": ops.TokenMetric.max(values_T),
        "min": ops.TokenMetric.min(values_T),
    }


def test_metrics_of_parts_merge_to_those_of_the_whole():
    totals: dict[str, ops.TokenMetric] = {}
    for part in ([1.0, 5.0, 3.0], [], [-1.0]):  # a microbatch may be empty
        ops.accumulate(totals, metrics_of(torch.tensor(part)))
    assert dict(ops.to_metrics(totals)) == {"mean": 2.0, "share": 0.5, "sum": 8.0, "max": 5.0, "min": -1.0}


def test_metrics_of_ranks_merge_like_those_of_microbatches():
    ranks = [ops.to_metrics(metrics_of(torch.tensor(part))) for part in ([1.0, 5.0, 3.0], [-1.0])]
    assert dict(ranks[0] + ranks[1]) == {"mean": 2.0, "share": 0.5, "sum": 8.0, "max": 5.0, "min": -1.0}


def test_metrics_hold_no_graph():
    values_T = torch.ones(3, requires_grad=True)
    for metric in metrics_of(values_T * 2.0).values():
        assert not metric.total.requires_grad


def test_metrics_of_different_kinds_do_not_merge():
    with pytest.raises(AssertionError, match="a mean and a max"):
        ops.accumulate({"x": ops.TokenMetric.mean(torch.ones(1))}, {"x": ops.TokenMetric.max(torch.ones(1))})


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'PolicyLos'"):
        ops.PolicyLos  # type: ignore[attr-defined]  # noqa: B018


def test_every_name_of_the_package_can_be_had():
    assert all(getattr(ops, name) is not None for name in dir(ops))


def test_the_mean_of_a_row_without_tokens_is_zero() -> None:
    means_B = ops.row_means(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([2, 0, 1]))
    assert means_B.tolist() == [2.0, 0.0, 5.0]
