"""Weights and gradients that are not finite: found wherever they come from, named, and told since when."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, RunConfig
from hybridflow.errors import DivergenceError
from hybridflow.ops.losses import PolicyLoss, ValueLoss
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from tests.training_rows import context_of, model_without_zero_weights, random_batch, training_config

WORKERS = [ActorWorker, CriticWorker]
LOSSES = {ActorWorker: PolicyLoss(), CriticWorker: ValueLoss()}
TOKENS = ("prompt", "response", "log_probs", "advantages", "values")
READERS: list[Callable[[ActorWorker | CriticWorker, Path], object]] = [
    lambda worker, folder: worker.save(str(folder)),
    lambda worker, folder: worker.core.named_tensors(),
]
"""What hands weights on: a checkpoint and a weight sync."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


def worker_of(kind: type[ActorWorker | CriticWorker], config: Config) -> ActorWorker | CriticWorker:
    return kind(config, context_of("actor" if kind is ActorWorker else "critic"))


def rows(*, scale: float = 1.0) -> Batch:
    batch = random_batch([(3, 5), (2, 7)])
    returns = batch.tokens("returns")
    scaled = Ragged.from_lengths(returns.values * np.float32(scale), returns.lengths)
    others = {name: batch.tokens(name) for name in TOKENS}
    return Batch.from_columns({**batch.light, **others, "returns": scaled})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("kind", WORKERS)
def test_a_weight_that_is_not_finite_goes_no_further(
    model_path: str, tmp_path: Path, kind: type[ActorWorker], read: Callable[..., object], value: float
) -> None:
    worker = worker_of(kind, training_config(model_path))
    worker.begin_step(4, 9)
    worker.core.named_tensors()
    name, parameter = list(worker.model.named_parameters())[3]
    worker.begin_step(5, 9)
    with torch.no_grad():
        parameter.view(-1)[7] = value
    with pytest.raises(
        DivergenceError, match=rf"1 of \d+ tensors.*{name}.*still finite at the weight sync of step 4"
    ) as raised:
        read(worker, tmp_path)
    assert "5" in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", WORKERS)
def test_a_model_that_no_longer_learns_ends_the_run_and_says_why(
    model_path: str, kind: type[ActorWorker], caplog: pytest.LogCaptureFixture
) -> None:
    worker = worker_of(kind, training_config(model_path))
    worker.begin_step(2, 9)
    worker.update(rows(), loss=LOSSES[kind])
    with torch.no_grad():  # finite, as after one update at a rate of 1e30
        for parameter in worker.model.parameters():
            parameter.mul_(1e30)
    worker.begin_step(3, 9)
    with caplog.at_level(logging.WARNING, "hybridflow"):
        for _ in range(4):
            assert worker.update(rows(), loss=LOSSES[kind])[f"{worker.context.role}/skipped_updates"] == 1
        with pytest.raises(DivergenceError, match="no longer learns: 5 updates in a row") as raised:
            worker.update(rows(), loss=LOSSES[kind])
    assert len(caplog.records) == 1
    for part in (
        "since step 3",
        "Not finite are the gradients of",
        "The weights have diverged: the largest is",
        "learning_rate",
    ):
        assert part in str(raised.value)


def test_updates_that_are_made_in_between_begin_the_count_anew(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    for _ in range(3):
        for _ in range(4):
            assert worker.update(rows(scale=3e38), loss=ValueLoss(clip=None))["critic/skipped_updates"] == 1
        assert worker.update(rows(), loss=ValueLoss(clip=None))["critic/skipped_updates"] == 0


def test_the_number_of_updates_is_the_users(model_path: str) -> None:
    config = training_config(model_path)
    for most, num_allowed in ((1, 0), (2, 1), (None, 9)):
        run = RunConfig(max_skipped_updates=most)
        worker = worker_of(CriticWorker, Config(**{**vars(config), "run": run}))
        for _ in range(num_allowed):
            worker.update(rows(scale=3e38), loss=ValueLoss(clip=None))
        if most is not None:
            with pytest.raises(DivergenceError, match=f"{most} updates in a row"):
                worker.update(rows(scale=3e38), loss=ValueLoss(clip=None))
