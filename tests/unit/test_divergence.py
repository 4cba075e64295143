"""Weights and gradients that are not finite: found wherever they come from, named, and told since when."""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller.failed_rewards import FailedRewards
from hybridflow.controller.loop import Loop
from hybridflow.errors import DivergenceError, ModelError, RewardError
from hybridflow.metrics import Metrics
from hybridflow.ops.losses import NextTokenLoss, PolicyLoss, TokenBatch, ValueLoss
from hybridflow.ops.reduce import TokenMetric
from hybridflow.workers import finite
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.reference import ReferenceWorker
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
    return Batch.from_columns({**batch.per_row, **others, "returns": scaled})


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
    with pytest.raises(DivergenceError, match=rf"1 of \d+ tensors.*{name}.*in order at the weight sync of step 4") as raised:
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


def test_rewards_that_are_too_large_are_blamed_before_the_rate(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    with pytest.raises(DivergenceError) as raised:
        for _ in range(5):
            worker.update(rows(scale=1e30), loss=ValueLoss(clip=None))
    advice = str(raised.value).partition("The weights are in order: what they are to learn from is too large. ")[2]
    assert advice.startswith("Give rewards of a smaller scale. Or lower critic.learning_rate=")


class RootOfZero(NextTokenLoss):
    """A mistake of whoever wrote it: the root's slope at 0 is infinite, and times the 0 of its argument not a number."""

    def __call__(self, batch: TokenBatch) -> tuple[torch.Tensor, dict[str, TokenMetric]]:
        total, metrics = super().__call__(batch)
        assert batch.log_probs_T is not None
        return total + (0.0 * batch.log_probs_T).sqrt().sum(), metrics


def test_a_loss_that_is_not_a_number_is_blamed_on_no_reward_and_no_rate(model_path: str) -> None:
    worker = worker_of(ActorWorker, training_config(model_path))
    with pytest.raises(DivergenceError, match=r"The weights are in order\. Look at what the loss computes") as raised:
        for _ in range(5):
            worker.update(rows(), loss=RootOfZero())
    assert "The norm of the gradient is nan" in str(raised.value)
    assert not re.search("reward|[Ll]ower|too large", str(raised.value))


def test_an_infinite_gradient_without_rewards_is_not_blamed_on_them() -> None:
    why = finite.why_skipped(math.inf, {"q": math.inf}, {"q": 1.0}, {"loss": 1e30}, ("loss_mask",))
    assert why.cause == "too large" and not why.learns_from_rewards and why.words.endswith("The weights are in order.")
    skipped = finite.SkippedUpdates(context_of("actor"), config=training_config("").actor, most=1)
    skipped.note(is_skipped=True, step=1, why=why)
    with pytest.raises(DivergenceError, match=r"The weights are in order\. Lower actor\.learning_rate=0\.001$"):
        skipped.raise_if_too_many()


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


class Broken:
    """Loads weights of which one is not finite, by whatever worker."""

    def __init__(self, folder: Path, source: str):
        shutil.copytree(source, folder / "broken")
        file = folder / "broken" / "model.safetensors"
        tensors = load_file(file)
        self.name = next(name for name in tensors if "up_proj" in name)
        tensors[self.name].view(-1)[3] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        self.config = training_config(str(folder / "broken"))


@pytest.mark.parametrize("kind", [ActorWorker, CriticWorker, ReferenceWorker])
def test_a_model_that_is_not_finite_is_refused_when_it_is_loaded(
    model_path: str, tmp_path: Path, kind: type[ReferenceWorker]
) -> None:
    broken = Broken(tmp_path, model_path)
    with pytest.raises(ModelError, match=r"holds weights that are not finite numbers: .*up_proj"):
        kind(broken.config, context_of(kind.__name__))


def test_a_checkpoint_that_is_not_finite_is_refused_when_it_is_read(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    with monkeypatch.context() as unchecked, torch.no_grad():  # as one that was written before weights were checked
        unchecked.setattr(worker.core.weights, "check", lambda *arguments, **named: None)
        next(iter(worker.model.parameters())).view(-1)[7] = float("nan")
        worker.save(str(tmp_path))
    with pytest.raises(DivergenceError, match=r"1 of .* not finite in the checkpoint"):
        worker_of(CriticWorker, training_config(model_path)).restore(str(tmp_path))


@pytest.mark.parametrize("value", [1e39, float("nan"), float("-inf")])
def test_rewards_of_any_role_are_judged_as_float32(value: float) -> None:
    rows = Batch({"reward": np.array([0.0, value]), "group": np.zeros(2, np.int64)})
    guard = FailedRewards(prompts_per_step=1, max_share=1.0, cause=lambda: "")
    with pytest.raises(RewardError, match="1 of 2 rewards are not finite as float32"):
        guard.watching(lambda prompts: rows)(Batch({"prompt_id": np.arange(1)}))


@pytest.mark.parametrize("kind", WORKERS)
def test_a_weight_that_is_as_good_as_infinite_goes_no_further(model_path: str, tmp_path: Path, kind: type[ActorWorker]) -> None:
    worker = worker_of(kind, training_config(model_path))
    with torch.no_grad():
        list(worker.model.parameters())[2].view(-1)[1] = -1e30
    for read in READERS:
        with pytest.raises(DivergenceError, match=r"1 of \d+ tensors hold numbers as large as 1e\+30"):
            read(worker, tmp_path)


def test_a_moment_of_the_optimizer_that_is_infinite_is_not_saved(model_path: str, tmp_path: Path) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    worker.update(rows(), loss=ValueLoss())
    worker.save(str(tmp_path / "first"))
    next(iter(worker.core.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")
    worker.core.named_tensors()  # an engine does not read it
    with pytest.raises(DivergenceError, match=r"1 of \d+ tensors .* exp_avg_sq of "):
        worker.save(str(tmp_path / "second"))


@pytest.mark.parametrize(
    "write", [lambda weight: weight.data.fill_(float("nan")), lambda weight: weight.detach().fill_(float("nan"))]
)
def test_what_is_saved_is_read_again_however_it_was_written_to(
    model_path: str, tmp_path: Path, write: Callable[[torch.Tensor], object]
) -> None:
    worker = worker_of(ActorWorker, training_config(model_path))
    worker.core.named_tensors()
    write(next(iter(worker.model.parameters())))
    with pytest.raises(DivergenceError, match="in order at the weight sync"):
        worker.save(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_weights_are_read_again_only_where_somebody_has_written_to_them(
    model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(ActorWorker, training_config(model_path))
    read: list[int] = []
    monkeypatch.setattr(finite, "norms", lambda tensors: read.append(len(list(tensors))) or {})
    num_tensors = len(list(worker.model.parameters()))
    worker.core.named_tensors()
    assert read == [0], "found finite when the model was loaded"
    worker.update(rows(), loss=PolicyLoss())
    worker.core.named_tensors()
    worker.core.named_tensors()
    assert read == [0, num_tensors, 0]
    with torch.no_grad():
        list(worker.model.parameters())[2].add_(1.0)
    worker.core.named_tensors()
    assert read[3] == 1


def test_a_short_run_that_ends_without_learning_is_no_success(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    for step in (1, 2, 3):
        worker.begin_step(step, 4)
        worker.update(rows(scale=3e38 if step > 1 else 1.0), loss=ValueLoss(clip=None))
    worker.begin_step(4, 4)
    worker.update(rows(scale=3e38), loss=ValueLoss(clip=None))
    with pytest.raises(DivergenceError, match=r"the last 3 of 4 updates were skipped, since step 2\. The norm") as raised:
        worker.end_run()
    assert raised.value.since_step == 2


def test_one_update_that_is_skipped_at_the_end_is_no_failure(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    for step in (1, 2, 3, 4):
        worker.begin_step(step, 4)
        worker.update(rows(scale=3e38 if step == 4 else 1.0), loss=ValueLoss(clip=None))
    worker.end_run()


def test_updates_that_are_skipped_early_in_the_last_step_are_no_failure(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    worker.begin_step(1, 1)
    for scale in (3e38, 3e38, 1.0, 1.0):
        worker.update(rows(scale=scale), loss=ValueLoss(clip=None))
    worker.end_run()


def test_a_run_resumed_at_its_last_step_is_judged_as_a_whole(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    worker.begin_step(1000, 1000)
    for _ in range(2):
        worker.update(rows(scale=3e38), loss=ValueLoss(clip=None))
    worker.end_run()


def test_a_short_run_that_was_resumed_may_still_end_without_learning(model_path: str) -> None:
    worker = worker_of(CriticWorker, training_config(model_path))
    for step in (3, 4):
        worker.begin_step(step, 4)
        worker.update(rows(scale=3e38), loss=ValueLoss(clip=None))
    with pytest.raises(DivergenceError, match="the last 2 of 4 updates were skipped, since step 3"):
        worker.end_run()


def test_the_loop_ends_the_run_on_every_role_after_the_last_step_was_learned() -> None:
    roles = MagicMock()
    loop: Any = MagicMock(total_steps=2, launched=MagicMock(groups={"actor": roles.actor, "critic": roles.critic}))
    loop.config.data.curriculum = None
    batch = Batch({"response_tokens": np.array([1]), "prompt_tokens": np.array([1])})
    loop.rows.take.return_value = (batch, None)
    loop.algorithm.learn.side_effect = lambda batch: roles.learn() and Metrics()
    loop.weights.sync.return_value = Metrics()
    loop.launched.log.drain.return_value = Metrics()
    for step in (1, 2):
        roles.reset_mock()
        Loop.step(loop, step)
        called = [name for name, _, _ in roles.mock_calls if not name.endswith("result")]
        begun = ["actor.begin_step.start", "critic.begin_step.start", "learn", "learn().__bool__"]
        assert called == begun + (["actor.end_run.start", "critic.end_run.start"] if step == 2 else [])


@pytest.mark.parametrize(
    ("settings", "blamed"),
    [
        ({"learning_rate": 1e30}, "Lower critic.learning_rate=1e+30."),
        ({"learning_rate": 1e-3, "weight_decay": 1e6}, "Lower critic.weight_decay=1e+06: of every weight 1e+03 times itself"),
    ],
)
def test_what_is_advised_is_the_setting_that_has_ruined_the_weights(
    model_path: str, settings: dict[str, float], blamed: str
) -> None:
    config = training_config(model_path)
    worker = worker_of(CriticWorker, replace(config, critic=replace(config.critic, **settings)))  # type: ignore[arg-type]
    worker.begin_step(1, 9)
    with pytest.raises(DivergenceError, match=re.escape(blamed)):
        for _ in range(20):
            worker.update(rows(), loss=ValueLoss(clip=None))
            worker.core.named_tensors()


def test_a_frozen_model_has_no_setting_to_lower(model_path: str) -> None:
    worker = ReferenceWorker(training_config(model_path), context_of("reference"))
    with torch.no_grad():
        next(iter(worker.core.model.parameters())).view(-1)[7] = float("nan")
    with pytest.raises(DivergenceError, match="look at the model's files") as raised:
        worker.core.weights.check(worker.core.model.named_parameters(), when="now")
    assert "Lower" not in str(raised.value)
