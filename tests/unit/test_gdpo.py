"""GDPO's rewards: which prompts it refuses, and which combinations of options are refused before the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridflow.algorithms.dppo import DPPO
from hybridflow.algorithms.gdpo import GDPO
from hybridflow.batch import Batch
from hybridflow.config.schema import AlgorithmConfig, Config, LoopConfig
from hybridflow.metrics import Metrics
from tests.unit.config_cases import mistakes_of, right_run

GAME = "class Game:\n    def reset(self, row): ...\n    def step(self, action): ...\n"


def config_of(options: object, *, max_staleness: int = 0) -> Config:
    return Config(algorithm=AlgorithmConfig(options=options), loop=LoopConfig(max_staleness=max_staleness))


@pytest.mark.parametrize(("b", "is_kept"), [([0.0, 1.0], True), ([0.5, 0.5], True), ([np.nan, 0.0], True)])
def test_a_group_of_equal_sums_is_kept_where_its_rewards_differ(b: list[float], is_kept: bool) -> None:
    config = config_of(GDPO.config_class(rewards=("a", "b"), dynamic_sampling=True))
    algorithm = GDPO(config, dict.fromkeys(GDPO.roles(config)))  # type: ignore[arg-type]
    group = {"reward": np.ones(2, np.float32), "reward/a": np.array([1.0, 0.0]), "reward/b": np.array(b)}
    assert algorithm.keep(Batch(group)) is is_kept
    assert not algorithm.keep(Batch({**group, "reward/a": np.zeros(2), "reward/b": np.zeros(2)}))


def mistakes(folder: Path, *overrides: str, name: str = "gdpo") -> list[str]:
    (folder / "game.py").write_text(GAME)
    asked = [override.replace("GAME", str(folder / "game.py")) for override in overrides]
    return mistakes_of([*right_run(folder), f"algorithm={name}", *asked])


TWO = "reward.functions=[{name: gsm8k, label: accuracy}, {name: math}]"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["algorithm.rewards=[a]", "algorithm.overlong_penalty=1"], "algorithm.overlong_penalty: is no part of the sum"),
        (["algorithm.rewards=[a]", "environment.path=GAME"], "found 'a'; there is none without environment.add_reward"),
        ([TWO, "algorithm.rewards=[acuracy,math]"], "found 'acuracy'; there are accuracy, math; did you mean 'accuracy'?"),
        (["environment.path=GAME", "environment.rewards=turn"], "environment.rewards: found turn, but this algorithm"),
    ],
)
def test_rewards_that_would_not_count_are_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    (mistake,) = mistakes(tmp_path, *overrides)
    assert said in mistake


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.rewards=[a]"],  # only the function knows
        ["algorithm.overlong_penalty=1"],
        [TWO, "algorithm.rewards=[accuracy,math/steps]"],
        ["algorithm.rewards=[a]", "environment.path=GAME", "environment.add_reward=true"],
    ],
)
def test_rewards_that_may_be_there_are_right(tmp_path: Path, overrides: list[str]) -> None:
    assert mistakes(tmp_path, *overrides) == []


def test_rewards_of_turns_are_refused_only_where_rewards_are_rewritten(tmp_path: Path) -> None:
    overrides = ("environment.path=GAME", "environment.rewards=turn")
    (mistake,) = mistakes(tmp_path, *overrides, name="reinforce_plus_plus_baseline")
    assert "Set episode, or algorithm=reinforce_plus_plus or ppo" in mistake
    assert mistakes(tmp_path, *overrides, name="reinforce_plus_plus") == []


class Update:
    """Stands for an actor: keeps the loss that an update is given."""

    def __init__(self) -> None:
        self.update, self.loss = self, None

    def start(self, batch: Batch, *, loss: Any) -> Update:
        self.loss = loss
        return self

    def result(self) -> Metrics:
        return Metrics()


@pytest.mark.parametrize(
    ("max_staleness", "options", "cap"),
    [(0, {}, 20.0), (1, {}, 2.0), (1, {"ratio_cap": 1.5}, 1.5), (1, {"importance_cap": 30.0}, 20.0)],
)
def test_of_dppos_two_bounds_the_smaller_holds_for_an_importance_weight(
    max_staleness: int, options: dict[str, Any], cap: float
) -> None:
    config = config_of(DPPO.config_class(**options), max_staleness=max_staleness)
    actor = Update()
    algorithm = DPPO(config, dict.fromkeys(DPPO.roles(config), actor))  # type: ignore[arg-type]
    algorithm.learn(Batch({"reward": np.array([0.0, 1.0], np.float32), "group": np.zeros(2, np.int64)}))
    assert actor.loss.surrogate.keywords["cap"] == cap
