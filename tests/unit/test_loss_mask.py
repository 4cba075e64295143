"""Tokens that the policy did not sample: context for those behind them, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hybridflow import ops
from hybridflow.batch import Batch, Ragged
from hybridflow.controller.batch_metrics import length_metrics
from hybridflow.metrics import Metrics
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.token_functions import TokenAdvantages, count_loss_tokens
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

LENGTHS = [(3, 12), (1, 40), (20, 1), (9, 9), (2, 7), (30, 30), (1, 2)]
MASKED = masked(random_batch(LENGTHS))
FULL = {"kl_coefficient": 0.1, "entropy_coefficient": 0.01}
LOSSES = {
    "ppo": ops.PolicyLoss(**FULL, dual_clip=3.0),
    "ppo, present log-probabilities": ops.PolicyLoss(**FULL, old_log_probs="current"),
    "ppo, weighed by response": ops.PolicyLoss(**FULL, correction=ops.ImportanceCorrection(level="sequence", cap=1.2)),
    "ppo, over the engine's": ops.PolicyLoss(**FULL, old_log_probs="rollout_log_probs"),
    "grpo": ops.PolicyLoss(**FULL, advantage="advantage", aggregation="sequence_mean"),
    "dr. grpo": ops.PolicyLoss(advantage="advantage", aggregation="sequence_sum", max_tokens=40),
    "critic": ops.ValueLoss(),
    "sft": ops.NextTokenLoss(),
}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


def after_update(path: str, batch: Batch, loss: ops.Loss) -> tuple[dict[str, torch.Tensor], Metrics]:
    """Weights, and all that was told, after an update in several microbatches."""
    config = training_config(path, tokens_per_microbatch=64)
    kind, role = (CriticWorker, "critic") if isinstance(loss, ops.ValueLoss) else (ActorWorker, "actor")
    worker = kind(config, context_of(role))
    metrics = worker.update(batch, loss=loss)
    return whole_weights(worker.core.named_tensors()), metrics + worker.context.take_reported()


def test_the_disturbance_reaches_every_column_of_masked_tokens_and_no_other_token() -> None:
    mask, other = MASKED.tokens("loss_mask").values, disturbed(MASKED)
    for name in ("rollout_log_probs", "values", "advantages", "log_probs", "reference_log_probs", "returns"):
        before, after = MASKED.tokens(name).values, other.tokens(name).values
        assert (before[mask] == after[mask]).all() and not (before[~mask] == after[~mask]).any(), name
        assert np.isnan(after).any(), name
    assert (MASKED.tokens("response").values != other.tokens("response").values).any()


@pytest.mark.parametrize("name", LOSSES)
def test_what_stands_at_a_masked_token_changes_no_bit_of_an_update(model_path: str, name: str) -> None:
    weights, metrics = after_update(model_path, MASKED, LOSSES[name])
    other_weights, other_metrics = after_update(model_path, disturbed(MASKED), LOSSES[name])
    for key, weight in weights.items():
        assert torch.equal(weight, other_weights[key]), key
    assert dict(metrics) == dict(other_metrics)
    assert all(map(math.isfinite, metrics.values()))
    _, unmasked = after_update(model_path, MASKED.without(["loss_mask"]), LOSSES[name])
    assert next(value for key, value in metrics.items() if key.endswith("grad_norm")) != pytest.approx(
        next(value for key, value in unmasked.items() if key.endswith("grad_norm")), rel=1e-3
    ), "the mask matters"


@pytest.mark.parametrize("name", LOSSES)
def test_rows_with_a_masked_end_train_as_rows_without_that_end(model_path: str, name: str) -> None:
    whole = random_batch(LENGTHS)
    kept = [np.arange(count) < max(1, count - 5) for _, count in LENGTHS]
    masked_end = whole.join(Batch.from_columns({"loss_mask": Ragged.from_rows(kept, np.bool_)}))
    at = np.concatenate(kept)
    cut = whole.join(Batch.from_columns({name: whole.tokens(name).where(at) for name in token_columns(whole)}))
    weights, metrics = after_update(model_path, masked_end, LOSSES[name])
    expected_weights, expected = after_update(model_path, cut, LOSSES[name])
    for key, weight in weights.items():
        assert relative_difference(weight, expected_weights[key]) < 1e-5, key
    assert dict(metrics) == pytest.approx(dict(expected), rel=1e-4, abs=1e-6)


def token_columns(batch: Batch) -> list[str]:
    return [name for name in batch.names if name not in batch.per_row and name != "prompt"]


@pytest.mark.parametrize("worker", [ActorWorker, CriticWorker])
def test_passes_give_zero_at_masked_tokens_and_see_them_as_context(model_path: str, worker: type) -> None:
    built = worker(training_config(model_path, tokens_per_microbatch=64), context_of("any"))
    built.update(MASKED, loss=LOSSES["critic"] if worker is CriticWorker else LOSSES["sft"])  # new value heads are all 0
    call, column = (built.values, "values") if worker is CriticWorker else (built.log_probs, "log_probs")
    found, whole = (call(batch).tokens(column) for batch in (MASKED, MASKED.without(["loss_mask"])))
    mask = MASKED.tokens("loss_mask").values
    assert found.lengths.tolist() == MASKED["response_tokens"].tolist()
    assert not found.values[~mask].any() and whole.values[~mask].any()
    np.testing.assert_allclose(found.values[mask], whole.values[mask], atol=1e-5)


def test_entropy_and_mismatch_are_those_of_sampled_tokens(model_path: str) -> None:
    actor = ActorWorker(training_config(model_path), context_of("actor"))
    log_probs = actor.log_probs(MASKED).tokens("log_probs").values
    told = actor.context.take_reported()
    mask, rollout = MASKED.tokens("loss_mask").values, MASKED.tokens("rollout_log_probs").values
    assert told["mismatch/mean"] == pytest.approx(np.abs(log_probs - rollout)[mask].mean(), rel=1e-5)
    assert told["mismatch/max"] == pytest.approx(np.abs(log_probs - rollout)[mask].max(), rel=1e-5)
    actor.log_probs(disturbed(MASKED))
    assert dict(actor.context.take_reported()) == dict(told)


ESTIMATE = TokenAdvantages(gamma=0.9, lam=0.8, whiten=True, kl_coefficient=0.2, kl_estimator="k1", log_probs="log_probs")


def test_advantages_with_a_mask_are_those_of_rows_without_the_masked_tokens() -> None:
    batch = disturbed(MASKED.with_columns(reward=np.arange(len(MASKED), dtype=np.float32)))
    mask = batch.tokens("loss_mask").values
    short = batch.join(Batch.from_columns({name: batch.tokens(name).where(mask) for name in token_columns(batch)}))
    found, expected = (ESTIMATE(rows, context_of("critic")) for rows in (batch, short.without(["loss_mask"])))
    np.testing.assert_array_equal(found["kl"], expected["kl"])
    for name in ("advantages", "returns"):
        np.testing.assert_array_equal(found.tokens(name).values[mask], expected.tokens(name).values)
        assert not found.tokens(name).values[~mask].any()
        assert found.tokens(name).lengths.tolist() == batch["response_tokens"].tolist()
    assert abs(expected.tokens("advantages").values.mean()) < 1e-6, "whitened over the tokens that count"


def test_lengths_are_those_of_sampled_tokens() -> None:
    counted = MASKED.join(count_loss_tokens(MASKED, context_of("data")))
    sampled = [int(row.sum()) for row in MASKED.tokens("loss_mask")]
    assert counted["loss_tokens"].tolist() == sampled
    assert length_metrics(counted)["response/tokens_mean"] == pytest.approx(np.mean(sampled))
    assert length_metrics(counted)["response/tokens_max"] == max(sampled)


def test_updates_count_sampled_tokens(model_path: str) -> None:
    _, metrics = after_update(model_path, MASKED, ops.NextTokenLoss())
    assert metrics["actor/tokens"] == MASKED.tokens("loss_mask").values.sum()
