"""Masked tokens and temperatures of rows over several data and sequence ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.metrics import Metrics
from hybridflow.ops.losses import PolicyLoss, ValueLoss
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.token_functions import TokenAdvantages
from tests.distributed.ranks import on_ranks
from tests.distributed.test_data_parallel import mine
from tests.training_rows import (
    context_of,
    disturbed,
    masked,
    model_without_zero_weights,
    random_batch,
    relative_difference,
    training_config,
    whole_weights,
)

LENGTHS = [(3, 12), (1, 90), (20, 1), (9, 9), (2, 7), (30, 30), (1, 2)]
ROWS = masked(random_batch(LENGTHS)).with_columns(
    temperature=np.array([0.7, 1.3, 0.7, 1.3, 1.3, 0.7, 1.3]), reward=np.arange(7, dtype=np.float32)
)
LOSS = PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.01)
ESTIMATE = TokenAdvantages(gamma=0.9, lam=0.8, whiten=True, kl_coefficient=0.2, kl_estimator="k1", log_probs="log_probs")
LAYOUTS = {"two data ranks": Layout(data=2), "two sequence ranks": Layout(sequence=2)}


@dataclass(frozen=True)
class Step:
    """What a rank saw of a pass, an estimate of advantages and an update of both models."""

    columns: Batch
    metrics: Metrics
    weights: dict[str, torch.Tensor]


def step(path: str, layout: Layout, batch: Batch) -> Step:
    config = training_config(path, tokens_per_microbatch=64)
    actor, critic = ActorWorker(config, context_of("actor", layout)), CriticWorker(config, context_of("critic", layout))
    rows = mine(batch.with_columns(row=np.arange(len(batch))), actor.context)
    passed = actor.log_probs(rows)
    told = actor.context.take_reported()
    columns = passed.join(ESTIMATE(rows, critic.context)) if layout.sequence == 1 else passed
    metrics = actor.update(rows, loss=LOSS) + critic.update(rows, loss=ValueLoss()) + told
    weights = whole_weights([*actor.named_tensors(), *((f"critic.{n}", t) for n, t in critic.core.named_tensors())])
    return Step(columns.with_columns(row=rows["row"]), metrics, weights)


def steps(path: str) -> dict[str, tuple[Step, Step]]:
    """With the rows as they are, and with other numbers at masked tokens."""
    return {name: (step(path, layout, ROWS), step(path, layout, disturbed(ROWS))) for name, layout in LAYOUTS.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def on_two_ranks(path: str) -> list[dict[str, tuple[Step, Step]]]:
    return on_ranks(2, steps, path)


def leaders(on_two_ranks: list[dict[str, tuple[Step, Step]]], name: str) -> list[Step]:
    return [rank[name][0] for number, rank in enumerate(on_two_ranks) if LAYOUTS[name].is_data_leader(number)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_stands_at_a_masked_token_changes_no_bit_on_any_rank(
    on_two_ranks: list[dict[str, tuple[Step, Step]]], name: str
) -> None:
    for rank in on_two_ranks:
        found, other = rank[name]
        assert dict(found.metrics) == dict(other.metrics)
        for key, weight in found.weights.items():
            assert torch.equal(weight, other.weights[key]), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_learn_from_masked_rows_at_two_temperatures_as_one_does(
    path: str, on_two_ranks: list[dict[str, tuple[Step, Step]]], name: str
) -> None:
    one, merged = step(path, Layout(), ROWS), Metrics.merged(found.metrics for found in leaders(on_two_ranks, name))
    for key, expected in one.metrics.items():
        if "fraction" not in key and "p99" not in key:  # counts of comparisons, which rounding may turn; a rank's own
            assert merged[key] == pytest.approx(expected, rel=1e-5, abs=1e-6), key
    for rank in on_two_ranks:
        for key, weight in one.weights.items():
            assert relative_difference(rank[name][0].weights[key], weight) < 1e-5, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_give_the_columns_that_one_gives(
    path: str, on_two_ranks: list[dict[str, tuple[Step, Step]]], name: str
) -> None:
    rows = Batch.concatenate([found.columns for found in leaders(on_two_ranks, name)])
    rows, one = rows.select(np.argsort(rows["row"])), step(path, Layout(), ROWS).columns
    for column in rows.names:
        if column not in rows.per_row:
            np.testing.assert_allclose(rows.tokens(column).values, one.tokens(column).values, rtol=1e-5, atol=1e-5)
