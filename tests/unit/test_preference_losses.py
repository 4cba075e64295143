"""Pairs: their losses against plain Python, and that a pair is whole wherever rows are divided."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow.batch import Batch
from hybridflow.config.schema import AlgorithmConfig, Config, RewardModelConfig, RunConfig
from hybridflow.controller.protocols import Arguments, SplitByDataRank
from hybridflow.ops.losses import TokenBatch
from hybridflow.ops.preferences import PreferenceLoss, RewardModelLoss
from hybridflow.ops.reduce import Counts, token_weights
from hybridflow.parallel.layout import Layout
from hybridflow.workers.reward_model import RewardModelWorker
from tests.training_rows import context_of, model_without_zero_weights, random_batch, training_config, whole_weights

LENGTHS = [(3, 5), (3, 40), (20, 1), (20, 9), (2, 2), (2, 30)]


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_the_loss_of_a_reward_model_is_that_of_bradley_and_terry_with_margin_and_centring():
    scores, margins = [1.0, -0.5, 0.2, 0.9], [0.3, 0.0]
    lengths = torch.ones(4, dtype=torch.int64)
    batch = TokenBatch(
        values_T=torch.tensor(scores),
        columns={"margin": torch.tensor([0.3, 0.3, 0.0, 0.0])},
        lengths_B=lengths,
        weights_T=token_weights(lengths, aggregation="token_mean", counts=Counts(tokens=4, rows=4)),
    )
    loss, metrics = RewardModelLoss(centring_coefficient=0.1, has_margin=True)(batch)
    pairs = [(scores[0], scores[1], margins[0]), (scores[2], scores[3], margins[1])]
    expected = sum(-log_sigmoid(c - r - m) + 0.1 * (c + r) ** 2 for c, r, m in pairs) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["accuracy"].total / metrics["accuracy"].count) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "kto"])
def test_preference_losses_are_those_of_their_papers(kind: str):
    log_probs, reference = [-1.0, -2.0, -0.5, -1.5, -1.0], [-1.5, -1.0, -1.0, -2.0, -0.2]
    lengths = torch.tensor([2, 3])  # one pair: chosen of 2 tokens, rejected of 3
    batch = TokenBatch(
        log_probs_T=torch.tensor(log_probs),
        columns={"reference_log_probs": torch.tensor(reference), "kl_baseline": torch.full((5,), 0.4)},
        lengths_B=lengths,
        weights_T=token_weights(lengths, aggregation="sequence_mean", counts=Counts(tokens=5, rows=2)),
    )
    loss, metrics = PreferenceLoss(kind=kind, beta=0.5, label_smoothing=0.1 if kind == "sigmoid" else 0.0)(batch)
    ratios = [p - q for p, q in zip(log_probs, reference, strict=True)]
    chosen, rejected = sum(ratios[:2]), sum(ratios[2:])
    h = 0.5 * (chosen - rejected)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = {
        "sigmoid": -0.9 * log_sigmoid(h) - 0.1 * log_sigmoid(-h),
        "ipo": (chosen - rejected - 1 / (2 * 0.5)) ** 2,
        "kto": ((1 - sigmoid(0.5 * (chosen - 0.4))) + (1 - sigmoid(0.5 * (0.4 - rejected)))) / 2,
    }[kind]
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["margin"].total / metrics["margin"].count) == pytest.approx(h, rel=1e-6)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


def pairs() -> Batch:
    return random_batch(LENGTHS).with_columns(pair=np.repeat(np.arange(3), 2))


def config_of(path: str, *, algorithm: str = "reward_model", **settings: object) -> Config:
    section = RewardModelConfig(**{"learning_rate": 1e-2, **settings})
    return dataclasses.replace(training_config(path), algorithm=AlgorithmConfig(name=algorithm), reward_model=section)


def trained(path: str, **settings: object) -> RewardModelWorker:
    worker = RewardModelWorker(config_of(path, **settings), context_of("reward_model"))
    worker.begin_step(1, 1)
    for _ in range(3):
        worker.update(pairs(), loss=RewardModelLoss(centring_coefficient=0.01))
    return worker


def test_a_score_is_what_the_head_reads_of_the_last_token(model_path: str):
    worker, batch = trained(model_path), pairs()
    scores = worker.score(batch)["reward_model_score"]
    backbone = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).base_model
    weights = whole_weights(list(worker.model.named_parameters()))
    backbone.load_state_dict({name.removeprefix("backbone."): w for name, w in weights.items() if "backbone." in name})
    for row, (prompt, response) in enumerate(zip(batch.tokens("prompt"), batch.tokens("response"), strict=True)):
        ids = torch.tensor(np.concatenate([prompt, response]).astype(np.int64))[None]
        hidden = backbone(ids).last_hidden_state[0, -1]
        expected = hidden @ weights["value_head.weight"][0] + weights["value_head.bias"][0]
        assert scores[row] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_dividing_pairs_over_microbatches_changes_nothing(model_path: str, tokens: int):
    scores = trained(model_path, tokens_per_microbatch=tokens).score(pairs())["reward_model_score"]
    expected = trained(model_path, tokens_per_microbatch=16384).score(pairs())["reward_model_score"]
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_updates_raise_the_accuracy_that_measure_reports(model_path: str):
    worker = trained(model_path)
    before = RewardModelWorker(config_of(model_path), context_of("reward_model"))
    loss = RewardModelLoss()
    assert before.measure(pairs(), loss=loss)["reward_model/loss"] == pytest.approx(math.log(2), rel=1e-5)  # a head of zeros
    assert worker.measure(pairs(), loss=loss)["reward_model/loss"] < math.log(2)
    assert worker.measure(pairs(), loss=loss)["reward_model/accuracy"] > 0.5


@pytest.mark.parametrize("most", [3, None])
def test_the_number_of_skipped_updates_is_the_users(model_path: str, most: int | None):
    config = dataclasses.replace(config_of(model_path), run=RunConfig(max_skipped_updates=most))
    worker = RewardModelWorker(config, context_of("reward_model"))
    assert worker.trained is not None
    assert worker.trained.skipped.most == most


def test_a_pair_goes_to_one_rank():
    batch = pairs().select([4, 5, 0, 1, 2, 3])
    parts = SplitByDataRank(Layout(data=2)).distribute(Arguments((batch,), {}))
    numbers = [part.args[0]["pair"].tolist() for part in parts if part is not None and isinstance(part.args[0], Batch)]
    assert len(numbers) == 2
    assert sorted(number for part in numbers for number in part) == [0, 0, 1, 1, 2, 2]
    for part in numbers:
        assert part[0::2] == part[1::2]


def test_a_model_in_use_has_no_optimizer_and_any_role_name(model_path: str, tmp_path: Path):
    config = config_of(model_path, algorithm="ppo")
    for role in ("reward_model", "cost_model", "safety"):
        worker = RewardModelWorker(config, context_of(role))
        assert worker.trained is None
        worker.begin_step(1, 1)
        worker.save(str(tmp_path))
        assert worker.score(pairs())[f"{role}_score"].shape == (6,)
    assert not list(tmp_path.iterdir())
