"""Several data and sequence ranks against one: the same losses, gradient norms and weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.data.balance import balanced_parts
from hybridflow.metrics import Metrics
from hybridflow.ops.losses import PolicyLoss, ValueLoss
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext
from hybridflow.workers.critic import CriticWorker
from tests.distributed.ranks import on_ranks
from tests.training_rows import (
    context_of,
    model_without_zero_weights,
    random_batch,
    relative_difference,
    training_config,
    whole_weights,
)

WILD = ((3, 5), (1, 200), (180, 1), (9, 9), (2, 7), (30, 30), (1, 1))
SINGLE = ((7, 30),)
LOSS = PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.01)
UPDATES = 5


@dataclass(frozen=True)
class Trained:
    """What a rank saw of a training run."""

    actor: list[Metrics]
    critic: list[Metrics]
    log_probs: Batch
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Setting:
    path: str
    lengths: tuple[tuple[int, int], ...]
    layout: Layout
    tokens_per_microbatch: int = 210
    save_to: str | None = None
    restore_from: str | None = None
    first_update: int = 1
    lora_rank: int = 0
    shard_gradients: bool = False


def mine(batch: Batch, context: RankContext) -> Batch:
    """This rank's rows, as the protocol would send them."""
    tokens = batch["prompt_tokens"] + batch["response_tokens"]
    return batch.select(balanced_parts(tokens, context.layout.data)[context.data_rank])


def train(setting: Setting) -> Trained:
    context = context_of("actor", setting.layout)
    model = {"lora_rank": setting.lora_rank}
    training = {"tokens_per_microbatch": setting.tokens_per_microbatch, "shard_gradients": setting.shard_gradients}
    config = training_config(setting.path, model=model, **training)
    actor, critic = ActorWorker(config, context), CriticWorker(config, context_of("critic", setting.layout))
    if setting.restore_from is not None:
        actor.restore(f"{setting.restore_from}/actor")
        critic.restore(f"{setting.restore_from}/critic")
    actor_metrics, critic_metrics = [], []
    for update in range(setting.first_update, setting.first_update + UPDATES):
        rows = mine(random_batch(setting.lengths, seed=update), context)
        actor_metrics.append(actor.update(rows, loss=LOSS))
        critic_metrics.append(critic.update(rows, loss=ValueLoss()))
    if setting.save_to is not None:
        actor.save(f"{setting.save_to}/actor")
        critic.save(f"{setting.save_to}/critic")
    log_probs = actor.log_probs(mine(random_batch(setting.lengths), context))
    weights = whole_weights([*actor.named_tensors(), *(("critic." + n, t) for n, t in critic.core.named_tensors())])
    return Trained(actor_metrics, critic_metrics, log_probs, weights)


def train_all(settings: list[Setting]) -> list[Trained]:
    """One after the other in one process: starting processes takes longer than training."""
    return [train(setting) for setting in settings]


def assert_same(ranks: list[Trained], layout: Layout, one: Trained) -> None:
    leaders = [trained for rank, trained in enumerate(ranks) if layout.is_data_leader(rank)]
    for update in range(UPDATES):
        for role in ("actor", "critic"):
            merged = Metrics.merged(getattr(trained, role)[update] for trained in leaders)
            for name, expected in getattr(one, role)[update].items():
                if "fraction" not in name:  # a count of comparisons, which rounding may turn
                    assert merged[name] == pytest.approx(expected, rel=1e-5, abs=1e-6), (update, name)
    for trained in ranks:
        for name, expected_weight in one.weights.items():
            assert relative_difference(trained.weights[name], expected_weight) < 1e-5, name


def log_probs_in_row_order(ranks: list[Trained], layout: Layout, lengths: tuple[tuple[int, int], ...]) -> Ragged:
    parts = balanced_parts(np.array(lengths).sum(1), layout.data)
    leaders = [trained for rank, trained in enumerate(ranks) if layout.is_data_leader(rank)]
    rows = Batch.concatenate([trained.log_probs for trained in leaders]).select(np.argsort(np.concatenate(parts)))
    return rows.tokens("log_probs")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tied_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("tied")), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def settings(path: str, tied_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Setting]:
    """What is trained on several ranks and on one, by name."""
    folder = tmp_path_factory.mktemp("states")
    resumed = Setting(path, WILD, Layout(data=2), restore_from=str(folder / "one"), first_update=6, save_to=str(folder / "two"))
    return {
        "two data ranks": Setting(path, WILD, Layout(data=2)),
        "a rank without rows": Setting(path, SINGLE, Layout(data=2)),
        "tied weights": Setting(tied_path, WILD, Layout(data=2)),
        "adapters": Setting(path, WILD, Layout(data=2), lora_rank=4),
        "gradients cut in every microbatch": Setting(path, WILD, Layout(data=2), shard_gradients=True),
        "a rank without rows, gradients cut": Setting(path, SINGLE, Layout(data=2), shard_gradients=True),
        "two sequence ranks": Setting(path, WILD, Layout(sequence=2)),
        "resumed": resumed,
        "three of four ranks without rows": Setting(path, SINGLE, Layout(data=4)),
        "two times two": Setting(path, WILD, Layout(data=2, sequence=2)),
    }


@pytest.fixture(scope="module")
def on_one_rank(settings: dict[str, Setting], path: str) -> dict[str, Trained]:
    state = str(Path(settings["resumed"].restore_from or "").parent / "one")
    train(Setting(path, WILD, Layout(), save_to=state))
    alone = {"layout": Layout(), "tokens_per_microbatch": 100_000, "save_to": None}
    return {name: train(dataclasses.replace(setting, **alone)) for name, setting in settings.items()}


@pytest.fixture(scope="module")
def on_many_ranks(settings: dict[str, Setting], on_one_rank: dict[str, Trained]) -> dict[str, list[Trained]]:
    """By name, what each rank saw."""
    found = {}
    for num_ranks in (2, 4):
        names = [name for name, setting in settings.items() if setting.layout.num_ranks == num_ranks]
        ranks = on_ranks(num_ranks, train_all, [settings[name] for name in names])
        found |= {name: [rank[number] for rank in ranks] for number, name in enumerate(names)}
    return found


NAMES = [
    "two data ranks",
    "a rank without rows",
    "tied weights",
    "adapters",
    "gradients cut in every microbatch",
    "a rank without rows, gradients cut",
    "two sequence ranks",
    "resumed",
    "three of four ranks without rows",
    "two times two",
]


@pytest.mark.parametrize("name", NAMES)
def test_many_ranks_train_as_one_does(
    name: str, settings: dict[str, Setting], on_one_rank: dict[str, Trained], on_many_ranks: dict[str, list[Trained]]
) -> None:
    assert_same(on_many_ranks[name], settings[name].layout, on_one_rank[name])


@pytest.mark.parametrize("name", NAMES)
def test_many_ranks_give_the_log_probs_that_one_gives(
    name: str, settings: dict[str, Setting], on_one_rank: dict[str, Trained], on_many_ranks: dict[str, list[Trained]]
) -> None:
    setting = settings[name]
    found = log_probs_in_row_order(on_many_ranks[name], setting.layout, setting.lengths)
    expected = log_probs_in_row_order([on_one_rank[name]], Layout(), setting.lengths)
    tolerance = 1e-5 if setting.layout.sequence > 1 else 1e-4  # between sequence ranks the promise; seen after 5 updates: 8e-6
    np.testing.assert_allclose(found.values, expected.values, rtol=tolerance, atol=tolerance)


def test_a_state_saved_by_two_ranks_trains_on_with_one(
    settings: dict[str, Setting], on_many_ranks: dict[str, list[Trained]], tmp_path: Path
) -> None:
    two = settings["resumed"]
    found = train(Setting(two.path, WILD, Layout(), restore_from=two.save_to, first_update=11))
    train(dataclasses.replace(two, layout=Layout(), save_to=str(tmp_path)))
    expected = train(Setting(two.path, WILD, Layout(), restore_from=str(tmp_path), first_update=11))
    assert_same([found], Layout(), expected)


def test_tied_weights_are_named_once(on_many_ranks: dict[str, list[Trained]]) -> None:
    for trained in on_many_ranks["tied weights"]:
        assert "lm_head.weight" not in trained.weights
        assert "model.embed_tokens.weight" in trained.weights
