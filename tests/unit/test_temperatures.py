"""Rows sampled at temperatures of their own, in one batch: engine and trainer mean the same distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from hybridflow import ops
from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, DataConfig, RolloutConfig
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.finite import WhySkipped
from hybridflow.workers.reference import ReferenceWorker
from hybridflow.workers.rollout import RolloutWorker, training_sampling
from tests.training_rows import (
    context_of,
    model_without_zero_weights,
    random_batch,
    relative_difference,
    training_config,
)

TEMPERATURES = np.array([0.7, 1.3, 1.3, 0.7, 0.0, 1.3])
LENGTHS = [(3, 5), (1, 30), (20, 1), (9, 9), (2, 7), (6, 11)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = model_without_zero_weights(str(tmp_path_factory.mktemp("model")))
    config = training_config(path, tokens_per_microbatch=80)
    reference = replace(config.reference, tokens_per_microbatch=80)
    data = DataConfig(max_prompt_tokens=32, max_response_tokens=20)
    return replace(config, reference=reference, data=data, rollout=RolloutConfig(engine="torch", max_num_seqs=8))


@pytest.fixture
def rollout(config: Config) -> Iterator[RolloutWorker]:
    worker = RolloutWorker(config, context_of("rollout"))
    yield worker
    worker.close()


def test_log_probs_of_rows_at_two_temperatures_are_those_of_the_engine(config: Config, rollout: RolloutWorker) -> None:
    random = np.random.default_rng(0)
    prompts = Batch.from_columns({"prompt": Ragged.from_rows([random.integers(4, 64, 9) for _ in range(8)], np.int32)})
    prompts = prompts.with_columns(seed=np.arange(8))
    sampling = training_sampling(config)
    parts = [rollout.generate(prompts, sampling=replace(sampling, temperature=number)) for number in (0.7, 1.3)]
    rows = Batch.concatenate([prompts.join(part) for part in parts]).select(np.random.default_rng(1).permutation(16))
    actor = ActorWorker(config, context_of("actor"))
    expected = rows.tokens("rollout_log_probs").values
    np.testing.assert_allclose(actor.log_probs(rows).tokens("log_probs").values, expected, atol=1e-4)
    assert actor.context.take_reported()["mismatch/max"] < 1e-4
    reference = ReferenceWorker(config, context_of("reference")).log_probs(rows)
    np.testing.assert_allclose(reference.tokens("reference_log_probs").values, expected, atol=1e-4)
    at_one = actor.log_probs(rows.without(["temperature"])).tokens("log_probs").values
    assert np.abs(at_one - expected).max() > 0.1, "the temperature matters"


def test_rows_at_several_temperatures_have_the_log_probs_that_each_has_alone(config: Config) -> None:
    batch = random_batch(LENGTHS).with_columns(temperature=TEMPERATURES)
    actor = ActorWorker(config, context_of("actor"))
    found = actor.log_probs(batch).tokens("log_probs")
    entropy = actor.context.take_reported()["actor/entropy"]
    entropies = []
    for row, (_, count) in enumerate(LENGTHS):
        # Greedy rows train the distribution as it is.
        at_own = replace(config.rollout, temperature=float(TEMPERATURES[row]) or 1.0)
        own = ActorWorker(replace(config, rollout=at_own), context_of("actor"))
        alone = own.log_probs(batch.select([row]).without(["temperature"])).tokens("log_probs")
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)
        entropies.append(own.context.take_reported()["actor/entropy"] * count)
    assert entropy == pytest.approx(sum(entropies) / sum(count for _, count in LENGTHS), rel=1e-5)


def test_the_gradient_of_two_temperatures_is_the_sum_of_those_of_each(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(LENGTHS).with_columns(temperature=TEMPERATURES)
    # A sum over rows instead of a mean over the batch, so that parts add up.
    loss = ops.PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.05, aggregation="sequence_sum", max_tokens=10)
    whole = gradients(config, batch, loss, monkeypatch)
    parts = [np.flatnonzero(np.isin(TEMPERATURES, number)) for number in (0.0, 0.7, 1.3)]
    shares = [gradients(config, batch.select(rows), loss, monkeypatch) for rows in parts]
    for name, gradient in whole.items():
        total = sum(share[name] * (len(rows) / len(batch)) for share, rows in zip(shares, parts, strict=True))
        assert isinstance(total, torch.Tensor)
        assert relative_difference(gradient, total) < 1e-5, name


def gradients(config: Config, batch: Batch, loss: ops.PolicyLoss, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Of one update, whose step is left out."""
    actor = ActorWorker(config, context_of("actor"))
    found: dict[str, torch.Tensor] = {}

    def keep(losses: object, columns: object) -> tuple[float, WhySkipped]:
        found.update({name: p.grad.full_tensor().clone() for name, p in actor.model.named_parameters() if p.grad is not None})
        return 0.0, WhySkipped()

    monkeypatch.setattr(actor.core, "_apply_gradients", keep)
    actor.update(batch, loss=loss)
    assert found.keys() >= {name for name, _ in actor.model.named_parameters()}
    return found
