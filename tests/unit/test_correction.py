"""Importance weights and rejections for tokens that the engine has sampled, of a microbatch and of a step."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from hybridflow import ops
from hybridflow.algorithms.options import UpdateOptions
from hybridflow.batch import Batch, Ragged
from hybridflow.config.choices import OfLargest, OfMeans, OfSums, OfTokens, Rejection, Statistic
from hybridflow.config.load import load_config
from hybridflow.config.schema import Config, LoopConfig
from hybridflow.workers.token_functions import CorrectTokens, count_loss_tokens
from tests.reference.losses import distances
from tests.training_rows import context_of
from tests.unit.config_cases import only_mistake, right_run
from tests.unit.test_algorithm_pages import algorithm_class
from tests.unit.test_algorithms_by_definition import LENGTHS, learn, rows_of

STATISTICS: list[Statistic] = [name for kind in (OfTokens, OfSums, OfMeans, OfLargest) for name in get_args(kind)]


def random_rows(seed: int, lengths: list[int], spread: float = 0.5) -> tuple[list[list[float]], list[list[float]]]:
    rng = np.random.default_rng(seed)
    trainer = [(-3.0 * rng.random(length)).tolist() for length in lengths]
    return trainer, [[value + spread * rng.standard_normal() for value in row] for row in trainer]


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_what_is_kept_is_within_the_bounds_of_the_definition(statistic: Statistic) -> None:
    lengths = [3, 0, 1, 7, 5, 2]
    trainer, engine = random_rows(len(statistic), lengths)
    found = [distances(p, q, statistic) for p, q in zip(trainer, engine, strict=True)]
    values = sorted({value for row in found for value in row})
    least, most = ((values[place] + values[place + 1]) / 2 for place in (len(values) // 4, 2 * len(values) // 3))
    correction = ops.ImportanceCorrection(rejections=(Rejection(statistic, most=most, least=least),))
    kept_T = correction.kept(flat(trainer), flat(engine), torch.tensor(lengths))
    assert kept_T.tolist() == [least <= value <= most for row in found for value in row]
    assert 0 < kept_T.sum() < len(kept_T), "some are in, some are out"


def test_a_token_stays_where_no_rejection_is_against_it() -> None:
    trainer, engine = random_rows(3, [4, 6])
    both = (Rejection("token_k2", most=0.2), Rejection("sequence_mean_k3", most=0.12))
    given = flat(trainer), flat(engine), torch.tensor([4, 6])
    each = [ops.ImportanceCorrection(rejections=(one,)).kept(*given) for one in both]
    assert torch.equal(ops.ImportanceCorrection(rejections=both).kept(*given), each[0] & each[1])


def test_probabilities_that_are_worlds_apart_reject_and_stay_finite() -> None:
    trainer_T, engine_T = torch.tensor([-500.0, -0.1, -0.1]), torch.tensor([-0.1, -500.0, -0.1])
    for statistic in STATISTICS:
        correction = ops.ImportanceCorrection(cap=2.0, rejections=(Rejection(statistic, most=5.0, least=-5.0),))
        weights_T, _ = correction.weights(trainer_T, engine_T, torch.tensor([1, 1, 1]))
        assert weights_T.isfinite().all() and weights_T[2] == 1.0, statistic
        assert weights_T[0] == 0.0, statistic


def step_rows() -> Batch:
    rows = rows_of(11)
    return rows.join(Batch.from_columns({"log_probs": rows.tokens("old_given")}))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalised_weights_have_a_mean_of_one(level: str) -> None:
    rows = step_rows()
    correction = ops.importance_correction(2.0, level)  # type: ignore[arg-type]
    assert correction is not None
    normalized = CorrectTokens(correction, is_normalized=True)
    weights = normalized(rows, context_of("actor")).tokens("importance_weights")
    sampled = weights.where(rows.tokens("loss_mask").values.astype(bool))
    means = sampled.values if level == "token" else np.array([row.mean() for row in sampled if len(row)])
    assert means.mean() == pytest.approx(1.0, rel=1e-6)


def test_a_correction_within_a_loss_which_has_no_whole_step_cannot_be_asked_to_normalise() -> None:
    with pytest.raises(TypeError, match="is_normalized"):
        ops.importance_correction(2.0, is_normalized=True)  # type: ignore[call-arg]


def test_rejected_tokens_leave_the_loss_mask_and_weights_are_of_the_tokens_before() -> None:
    rows = step_rows()
    correction = ops.importance_correction(1.2, "sequence", rejections=(Rejection("token_k2", most=0.02),))
    assert correction is not None
    corrected = CorrectTokens(correction)(rows, context_of("actor"))
    before, after = (batch.tokens("loss_mask").values.astype(bool) for batch in (rows, corrected))
    assert not (after & ~before).any() and 0 < after.sum() < before.sum()
    assert corrected["loss_tokens"].tolist() == [row.sum() for row in np.split(after, np.cumsum(LENGTHS)[:-1])]
    old, engine = (rows.tokens(name).where(before) for name in ("log_probs", "rollout_log_probs"))
    for row in range(len(rows)):
        bounds = slice(old.offsets[row], old.offsets[row + 1])
        total = math.fsum(old.values[bounds].astype(float) - engine.values[bounds].astype(float))
        weights = corrected.tokens("importance_weights")
        own = weights.values[weights.offsets[row] : weights.offsets[row + 1]]
        sampled = before[weights.offsets[row] : weights.offsets[row + 1]]
        assert own[sampled] == pytest.approx(min(math.exp(total), 1.2), rel=1e-5), row


@pytest.mark.parametrize("name", ["grpo", "ppo", "gmpo", "reinforce_plus_plus_baseline", "gspo"])
def test_a_step_with_rejections_is_that_of_rows_without_these_tokens(name: str) -> None:
    rejection = Rejection("token_k1", most=0.2, least=-0.3)
    rows = rows_of(12)
    last = np.cumsum(LENGTHS) - 1
    engine = rows.tokens("rollout_log_probs")
    values = engine.values.copy()
    values[last] = rows.tokens("old_given").values[last]  # the end of a row, where its reward is, stays
    rows = rows.join(Batch.from_columns({"rollout_log_probs": Ragged(values, engine.offsets)}))
    distance = values - rows.tokens("old_given").values
    mask = rows.tokens("loss_mask").values & (distance <= 0.2) & (distance >= -0.3)
    without = rows.join(Batch.from_columns({"loss_mask": Ragged(mask, engine.offsets)}))
    without = without.join(count_loss_tokens(without, context_of("data")))
    value, gradients = learn(name, rows, rejections=(rejection,))
    expected, others = learn(name, without)
    assert value == pytest.approx(expected, rel=1e-5) and mask.sum() < rows.tokens("loss_mask").values.sum()
    for found, wanted in zip(gradients, others, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_reinforce_over_the_engine_weighs_each_token_by_policy_over_engine() -> None:
    rows = rows_of(13)
    options = {"surrogate": "policy_gradient", "old_log_probs": "rollout", "kl_in": "none"}
    plain, _ = learn("grpo", rows, **options)
    same = rows.join(Batch.from_columns({"rollout_log_probs": rows.tokens("new_given")}))
    assert learn("grpo", same, importance_cap=5.0, **options)[0] == pytest.approx(plain, rel=1e-6)
    half = Ragged(rows.tokens("new_given").values + np.float32(math.log(2)), rows.tokens("new_given").offsets)
    halved = rows.join(Batch.from_columns({"rollout_log_probs": half}))
    assert learn("grpo", halved, importance_cap=5.0, **options)[0] == pytest.approx(0.5 * plain, rel=1e-5)


def test_the_clipped_ratio_over_the_engine_is_over_its_log_probabilities() -> None:
    rows = rows_of(14)
    over_engine = rows.join(Batch.from_columns({"old_given": rows.tokens("rollout_log_probs")}))
    expected, _ = learn("grpo", over_engine)
    value, _ = learn("grpo", rows, old_log_probs="rollout")
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("surrogate", ["clipped_ratio", "policy_gradient"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "sequence_sum"])
def test_over_the_engine_a_rows_mean_is_over_tokens_that_stay_and_other_counts_are_of_all(
    aggregation: str, surrogate: str
) -> None:
    rows = rows_of(15)
    options = {"old_log_probs": "rollout", "kl_in": "none", "surrogate": surrogate, "loss_aggregation": aggregation}
    _, found = learn("grpo", rows, rejections=(Rejection("token_k2", most=0.02),), **options)
    _, free = learn("grpo", rows, **options)
    mask = rows.tokens("loss_mask").values.astype(bool)
    policy, engine = ([*rows.tokens(name).where(mask)] for name in ("new_given", "rollout_log_probs"))
    num_kept = []
    for row, (left, of_all) in enumerate(zip(found, free, strict=True)):
        kept = [distance <= 0.02 for distance in distances(policy[row].tolist(), engine[row].tolist(), "token_k2")]
        scale = len(kept) / max(sum(kept), 1) if aggregation == "sequence_mean" else 1.0
        assert left == pytest.approx([scale * gradient * stays for gradient, stays in zip(of_all, kept, strict=True)], rel=1e-5)
        num_kept.append((sum(kept), len(kept)))
    assert any(0 < few < all_ for few, all_ in num_kept) and any(not few for few, _ in num_kept)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["algorithm.importance_normalized=true"], "Set algorithm.importance_cap=2"),
        (["algorithm.importance_normalized=true", "algorithm.rejections=[{statistic: token_k2, most: 1}]"], "importance_cap=2"),
        (
            ["algorithm.importance_normalized=true", "algorithm.importance_mask=[0.5,2]", "algorithm.old_log_probs=rollout"],
            "Set algorithm.old_log_probs=actor",
        ),
        (["algorithm.rejections=[{statistic: token_k1, most: 0, least: 1}]"], "nothing is left. Exchange them"),
        (["algorithm.rejections=[{statistic: sequence_mean_k3, most: -1}]"], "is never below 0"),
    ],
)
def test_a_correction_that_would_change_nothing_or_leave_nothing_is_refused(
    tmp_path: Path, options: list[str], words: str
) -> None:
    assert words in only_mistake(tmp_path, "algorithm=grpo", *options)


@pytest.mark.parametrize("option", [{"importance_normalized": True}, {"rejections": (Rejection("token_k2", most=0.02),)}])
@pytest.mark.parametrize("max_staleness", [0, 1])
def test_what_is_of_the_step_as_a_whole_is_computed_before_its_only_update(max_staleness: int, option: dict[str, Any]) -> None:
    options = algorithm_class("grpo").config_class(importance_cap=2.0, **option)
    assert isinstance(options, UpdateOptions)
    run = dataclasses.replace(Config(), loop=LoopConfig(max_staleness=max_staleness))
    assert options.corrects_before(run) and options.ratio_over(run) == "log_probs"
    loss = options.policy_loss(run, ops.policy_gradient)
    assert (loss.weight, loss.correction) == ("importance_weights", None)


def test_normalised_weights_are_of_the_whole_step() -> None:
    rows, options = rows_of(15), {"importance_cap": 1.1, "kl_in": "none"}
    plain, normalized = (learn("grpo", rows, importance_normalized=by, **options)[0] for by in (False, True))
    mask = rows.tokens("loss_mask").values.astype(bool)
    ratios = np.exp((rows.tokens("old_given").values - rows.tokens("rollout_log_probs").values)[mask].astype(float))
    assert normalized == pytest.approx(plain / np.minimum(ratios, 1.1).mean(), rel=1e-5)


@pytest.mark.parametrize(("name", "weight"), [("dro", "beta"), ("kl_cov", "covariance_kl")])
def test_a_pull_to_the_old_policy_is_to_the_engine_where_its_log_probabilities_are_the_old_ones(name: str, weight: str) -> None:
    rows = rows_of(16)
    over_engine = rows.join(Batch.from_columns({"old_given": rows.tokens("rollout_log_probs")}))
    for strength in (1.0, 100.0):
        value, _ = learn(name, rows, old_log_probs="rollout", **{weight: strength})
        assert value == pytest.approx(learn(name, over_engine, **{weight: strength})[0], rel=1e-5)


def test_one_update_from_older_weights_is_pulled_by_dro_to_what_has_sampled(tmp_path: Path) -> None:
    stale = ["algorithm=dro", "loop.max_staleness=1"]
    config = load_config(None, [*right_run(tmp_path), *stale])
    options = config.algorithm.options
    assert isinstance(options, UpdateOptions)
    assert options.ratio_over(config) == "rollout_log_probs"
    assert "and not weighed. Set auto" in only_mistake(tmp_path, *stale, "algorithm.importance_cap=3.0")


@pytest.mark.parametrize("name", ["gspo", "clip_cov"])
def test_algorithms_whose_loss_is_their_own_have_no_other_to_choose(tmp_path: Path, name: str) -> None:
    assert "no such key" in only_mistake(tmp_path, f"algorithm={name}", "algorithm.surrogate=policy_gradient")
