"""Every algorithm against its definition: the loss of a step's update and its gradient, on ragged and masked rows."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import AlgorithmConfig, Config, DataConfig
from hybridflow.metrics import Metrics
from hybridflow.ops import Loss
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.microbatches import Microbatches
from hybridflow.workers.reference import ReferenceWorker
from hybridflow.workers.remote import remote
from hybridflow.workers.token_functions import count_loss_tokens
from hybridflow.workers.training import token_batch
from tests.reference import algorithms as reference
from tests.training_rows import context_of
from tests.unit.local_groups import LocalDispatcher
from tests.unit.test_algorithm_pages import NAMES, algorithm_class

LENGTHS = [4, 7, 1, 5, 3, 6, 2, 9, 5, 4]
GROUPS = [0, 0, 0, 3, 3, 3, 8, 5, 5, 5]
"""Of three rows, of one, and (5) of equal rewards."""
REWARDS = [1.0, 0.0, 0.25, -2.0, 0.5, 3.0, 1.5, 0.75, 0.75, 0.75]
MAX_TOKENS = 9
OPTIONS: dict[str, dict[str, object]] = {
    "kl_cov": {"share": 0.2},
    "dppo": {"clip": (0.05, 0.1)},  # both are passed
    "clip_cov": {"share": 0.9, "bounds": (0.1, 2.0)},  # all that may be drawn
}


class GivenActor(ActorWorker):
    """Has the log-probabilities of the batch's columns, and keeps the loss of each update with its gradient."""

    __init__ = Worker.__init__

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch) -> Batch:
        return Batch.from_columns({"log_probs": batch.tokens("old_given")})

    @remote("split_by_data_rank")
    def update(self, batch: Batch, *, loss: Loss) -> Metrics:
        microbatches = Microbatches(batch, self.context, tokens_per_microbatch=10**6)
        (microbatch,) = microbatches
        new_T = microbatches.column("new_given", microbatch).requires_grad_()
        value, metrics = loss(token_batch(microbatches, microbatch, loss, {"log_probs": new_T}))
        value.backward()
        row_T = microbatches.column("row", microbatch).long()
        self.found = value.item(), [new_T.grad[row_T == row].tolist() for row in range(len(batch))], metrics
        return Metrics()


class GivenReference(ReferenceWorker):
    """The same for the reference."""

    __init__ = Worker.__init__

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch) -> Batch:
        return Batch.from_columns({f"{self.context.role}_log_probs": batch.tokens("reference_given")})


class GivenCritic(CriticWorker):
    """The same for values; learns nothing."""

    __init__ = Worker.__init__

    @remote("split_by_data_rank")
    def values(self, batch: Batch) -> Batch:
        return Batch.from_columns({"values": batch.tokens("values_given")})

    @remote("split_by_data_rank")
    def update(self, batch: Batch, *, loss: Loss) -> Metrics:
        names = ("returns", "returns_sq", "value_error", "value_error_sq")
        return Metrics(dict.fromkeys(names, 1.0)).prefixed("critic")


def rows_of(seed: int, *, rewards: list[float] = REWARDS, spread: float = 0.3, with_mask: bool = True) -> Batch:
    """Rows with columns of given log-probabilities; `spread` is how far policies are apart, in nats."""
    rng = np.random.default_rng(seed)
    lengths, num_tokens = np.array(LENGTHS), sum(LENGTHS)
    old = -3.0 * rng.random(num_tokens)
    numbers = {
        "old_given": old,
        "new_given": old + spread * rng.standard_normal(num_tokens),
        "reference_given": old + spread * rng.standard_normal(num_tokens),
        "rollout_log_probs": old + spread * rng.standard_normal(num_tokens),
        "values_given": rng.standard_normal(num_tokens),
    }
    tokens = {name: Ragged.from_lengths(column.astype(np.float32), lengths) for name, column in numbers.items()}
    response = Ragged.from_lengths(np.arange(4, 4 + num_tokens, dtype=np.int32), lengths)
    batch = Batch.from_columns(
        {
            "prompt": Ragged.from_rows([[1]] * len(lengths), np.int32),
            "response": response,
            "prompt_tokens": np.ones(len(lengths), np.int64),
            "response_tokens": lengths,
            "row": np.arange(len(lengths)),
            "reward": np.array(rewards, np.float32),
            "greedy_reward": np.array(GROUPS, np.float32) / 10,
            "reward/cost": np.array(rewards[::-1], np.float32),
            "reward/length": 100.0 * np.cos(np.arange(len(lengths))).astype(np.float32),
            "group": np.array(GROUPS),
            **tokens,
        }
    )
    if not with_mask:
        return batch
    mask = Ragged(np.arange(num_tokens) % 4 != 3, response.offsets)
    batch = batch.join(Batch.from_columns({"loss_mask": mask}))
    return batch.join(count_loss_tokens(batch, context_of("data")))


def learn(name: str, rows: Batch, **options: Any) -> tuple[float, list[list[float]]]:
    """The loss of the second of two epochs, whose one update is on all rows, and its gradient by row and token."""
    algorithm = algorithm_class(name)
    config = dataclasses.replace(
        Config(),
        algorithm=AlgorithmConfig(options=algorithm.config_class(epochs=2, **OPTIONS.get(name, {}) | options)),
        data=DataConfig(prompts_per_step=4, max_response_tokens=MAX_TOKENS),
    )
    classes = {"actor": GivenActor, "critic": GivenCritic, "reference": GivenReference, "teacher": GivenReference}
    workers = {role: kind(config, context_of(role)) for role, kind in classes.items()}
    handles = {role: type(one).group(LocalDispatcher([one], Layout(), pool_name=role)) for role, one in workers.items()}
    built = algorithm(config, {**handles, "rollout": handles["actor"], "reward": handles["actor"]})
    built.step = 1
    built.learn(rows)
    actor = workers["actor"]
    assert isinstance(actor, GivenActor)
    value, gradients, _ = actor.found
    return value, gradients


def case_of(name: str, rows: Batch, **options: Any) -> tuple[reference.Case, reference.Rows]:
    """The same rows for the slow version, and the policy's log-probabilities."""
    mask = rows.tokens("loss_mask") if "loss_mask" in rows else None

    def sampled(name: str) -> reference.Rows:
        column = rows.tokens(name)
        return [row.tolist() for row in (column if mask is None else column.where(mask.values))]

    case = reference.Case(
        reward=rows["reward"].tolist(),
        greedy_reward=rows["greedy_reward"].tolist(),
        cost=rows["reward/cost"].tolist(),
        group=rows["group"].tolist(),
        num_tokens=rows["response_tokens"].tolist(),
        old=sampled("old_given"),
        reference=sampled("reference_given"),
        values=sampled("values_given"),
        max_tokens=MAX_TOKENS,
        options=OPTIONS.get(name, {}) | options,
        parts={part: rows[f"reward/{part}"].tolist() for part in ("cost", "length")},
    )
    return case, sampled("new_given")


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_definition(name: str, with_mask: bool) -> None:
    rows = rows_of(sum(map(ord, name)), with_mask=with_mask)
    value, gradients = learn(name, rows)
    case, new = case_of(name, rows)
    assert value == pytest.approx(reference.loss(name, new, new, case), rel=2e-5, abs=1e-6)
    step = 1e-5
    for row, token in [(row, token) for row, length in enumerate(case.lengths) for token in range(length)]:
        ends = []
        for sign in (1, -1):
            moved = [list(other) for other in new]
            moved[row][token] += sign * step
            ends.append(reference.loss(name, moved, new, case))
        quotient = (ends[0] - ends[1]) / (2 * step)
        assert gradients[row][token] == pytest.approx(quotient, rel=1e-3, abs=2e-5), (row, token)


@pytest.mark.parametrize("options", [{}, {"reward_weights": (0.25, 2.0)}], ids=str)
def test_each_of_two_rewards_of_different_scale_is_normalised_before_gdpo_adds_them(options: dict[str, Any]) -> None:
    rows, options = rows_of(4), {"rewards": ("cost", "length"), **options}
    value, _ = learn("gdpo", rows, **options)
    case, new = case_of("gdpo", rows, **options)
    assert value == pytest.approx(reference.loss("gdpo", new, new, case), rel=2e-5, abs=1e-6)
    rows = rows.select(np.flatnonzero(rows["group"] != 8))  # a row alone keeps its reward
    larger = rows.with_columns(**{"reward/length": 1000 * rows["reward/length"]})
    value, other = (learn("gdpo", part, **options)[0] for part in (rows, larger))
    assert other == pytest.approx(value, rel=1e-4), "its scale does not count"


def test_ppo_learns_from_the_rows_that_are_drawn_by_their_rewards() -> None:
    _, gradients = learn("ppo", rows_of(6), resampling="best_and_worst")
    assert {row for row, gradient in enumerate(gradients) if gradient} == {3, 5}  # rewards -2 and 3
    assert sum(map(len, gradients)) > LENGTHS[3] + LENGTHS[5], "ten rows are drawn, each several times"


@pytest.mark.parametrize("by_std", [True, False])
def test_dppo_divides_by_the_standard_deviation_where_it_is_told_to(by_std: bool) -> None:
    # Groups of one reward left out, rewards twice as large: advantages double, or are what they were.
    rows, doubled = rows_of(5), rows_of(5, rewards=[2 * reward for reward in REWARDS])
    kept = np.flatnonzero(rows["group"] != 8)
    (value, _), (other, _) = (learn("dppo", part.select(kept), scale_by_std=by_std) for part in (rows, doubled))
    assert other == pytest.approx(value * (1 if by_std else 2), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_equal_rewards_teach_nothing_but_what_a_kl_or_a_critic_says(name: str) -> None:
    options = {} if name == "ppo" else {"kl_in": "none"}
    _, gradients = learn(name, rows_of(1, rewards=[0.1] * len(REWARDS)), **options)
    taught = [gradient for row in gradients for gradient in row if gradient]
    assert np.isfinite(taught).all()
    if name not in WITH_A_BASELINE_OF_THEIR_OWN:
        assert not [
            gradient for row, group in zip(gradients, GROUPS, strict=True) if group != 8 for gradient in row if gradient
        ]


WITH_A_BASELINE_OF_THEIR_OWN = {
    "ppo": "the critic's values",
    "gdpo": "normalised over the step",
    "distillation": "the teacher",
    "remax": "the greedy response",
    "dapo": "lengths differ, and are punished",
    "kl_cov": "a KL to the old policy",
    "dro": "the pull to the old policy",
    "reinforce_plus_plus_baseline": "a row alone has no baseline, and moves the mean of all",
}


@pytest.mark.parametrize("rewards", [REWARDS, [1e6 * reward for reward in REWARDS]], ids=["rewards", "large rewards"])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_ratios_and_rewards_give_finite_losses_and_gradients(name: str, rewards: list[float]) -> None:
    for options in ({}, {"importance_cap": 2.0}):
        value, gradients = learn(name, rows_of(2, rewards=rewards, spread=300.0), **options)
        assert math.isfinite(value)
        assert np.isfinite([gradient for row in gradients for gradient in row]).all()


@pytest.mark.parametrize("name", NAMES)
def test_importance_weights_multiply_the_surrogate(name: str) -> None:
    rows = rows_of(3)
    rows = rows.join(Batch.from_columns({"rollout_log_probs": rows.tokens("old_given")}))
    same, _ = learn(name, rows)
    weighed, _ = learn(name, rows, importance_cap=2.0)
    assert weighed == same, "trainer and engine agree: all weights are 1"
    shifted = Ragged(rows.tokens("old_given").values - np.float32(math.log(1.5)), rows.tokens("old_given").offsets)
    heavier, _ = learn(name, rows.join(Batch.from_columns({"rollout_log_probs": shifted})), importance_cap=2.0)
    without_kl = {} if name == "ppo" else {"kl_in": "none"}
    if name not in reference.KL_IN_LOSS:
        assert heavier == pytest.approx(1.5 * same, rel=1e-4), without_kl


def test_gmpo_weighs_a_row_by_the_geometric_mean_of_its_tokens_weights() -> None:
    rows = rows_of(3)
    value, _ = learn("gmpo", rows, importance_cap=2.0)
    case, new = case_of("gmpo", rows)
    engine = rows.tokens("rollout_log_probs").where(rows.tokens("loss_mask").values)
    losses = reference.row_losses("gmpo", new, new, case, reference.advantages("gmpo", case))
    of_rows = []
    for loss, old, sampled in zip(losses, case.old, engine, strict=True):
        weights = [min(math.exp(x - y), 2.0) for x, y in zip(old, sampled.tolist(), strict=True)]
        of_rows += [np.mean(loss) * math.prod(weights) ** (1 / len(weights))] if loss else []
    assert value == pytest.approx(np.mean(of_rows), rel=2e-5)


def test_a_case_has_what_the_definitions_differ_in() -> None:
    case, new = case_of("grpo", rows_of(0))
    assert torch.tensor(case.lengths).unique().numel() > 3 and min(case.lengths) < 2
    ratios = [math.exp(x - y) for p, q in zip(new, case.old, strict=True) for x, y in zip(p, q, strict=True)]
    assert min(ratios) < 0.8 and max(ratios) > 1.28
