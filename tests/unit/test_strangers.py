"""What a stranger writes in one file each: two rollouts per step, a loss that sees row lengths, refused prompts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.extend.length_loss import SquareRoot, square_root
from examples.extend.only_varied import OnlyVaried
from examples.extend.second_thought import SecondThought
from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.controller.stream import Stream, StreamSettings
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from tests.training_rows import context_of, model_without_zero_weights, whole_weights
from tests.unit.local_groups import LocalDispatcher
from tests.unit.test_algorithm_pages import PROMPTS, ROLES, config_of, only

PAGE = Path(__file__).parents[2] / "docs/writing_an_algorithm.md"


def algorithm_of_the_page() -> type[Algorithm]:
    """The file that docs/writing_an_algorithm.md shows."""
    (block,) = re.findall(r"```python\n# my_algorithm.py.*?```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": __name__}
    exec(block.removeprefix("```python\n").removesuffix("```"), names)
    shown = names["MyAlgorithm"]
    assert isinstance(shown, type) and issubclass(shown, Algorithm)
    return shown


@pytest.mark.parametrize("max_staleness", [0, 1])
@pytest.mark.parametrize(
    ("algorithm", "own"),
    [
        (SecondThought, "second_thought/reward"),
        (SquareRoot, "actor/row_weight"),
        (OnlyVaried, "varied/spread"),
        (algorithm_of_the_page(), "mine/best"),
    ],
)
def test_each_trains_and_tells_its_own_metric(
    tmp_path_factory: pytest.TempPathFactory, algorithm: type[Algorithm], own: str, max_staleness: int
) -> None:
    path = model_without_zero_weights(str(tmp_path_factory.mktemp("model")))
    config = config_of(path, algorithm, max_staleness=max_staleness)
    assert set(algorithm.roles(config)) == {"actor", "rollout", "reward"}
    workers = {role: ROLES[role](config, context_of(role)) for role in algorithm.roles(config)}
    dispatchers = {role: LocalDispatcher([one], Layout(), pool_name=role) for role, one in workers.items()}
    built = algorithm(config, {role: type(one).group(dispatchers[role]) for role, one in workers.items()})
    actor = workers["actor"]
    assert isinstance(actor, ActorWorker)
    before = whole_weights(actor.named_tensors())
    metrics = built.learn(built.collect(only(PROMPTS, "prompt", "prompt_tokens", "group")))
    assert np.isfinite(list(metrics.values())).all() and own in metrics
    assert any(not torch.equal(weight, before[name]) for name, weight in whole_weights(actor.named_tensors()).items())
    assert dispatchers["rollout"].called.count("generate") == (2 if algorithm is SecondThought else 1)


def test_the_loss_of_a_row_falls_with_the_root_of_its_length() -> None:
    zeros_T = torch.zeros(5)
    tokens = ops.PolicyTokens(log_probs_T=zeros_T, old_T=zeros_T, advantage_T=torch.ones(5), lengths_B=torch.tensor([4, 0, 1]))
    loss_T, _ = square_root(tokens)
    assert loss_T.tolist() == [-0.5] * 4 + [-1.0]  # 1 / sqrt(4), 1 / sqrt(1)


def test_others_take_the_place_of_refused_prompts() -> None:
    drawn: list[int] = []

    def draw(step: int, count: int) -> Batch:
        first = len(drawn)
        drawn.extend(range(first, first + count))
        return Batch({"prompt_id": np.arange(first, first + count)})

    def collect(prompts: Batch) -> Batch:  # prompts of odd number have equal rewards
        rows = prompts.repeat(2)
        return rows.with_columns(reward=np.where(rows["prompt_id"] % 2, 1.0, rows["sample"]))

    keep = lambda group: OnlyVaried.keep(None, group)  # type: ignore[arg-type]  # noqa: E731
    stream = Stream(StreamSettings(prompts_per_step=3, max_staleness=0, total_steps=1), draw, collect, keep)
    taken = stream.take(1)
    assert sorted(set(taken.rows["prompt_id"].tolist())) == [0, 2, 4] and taken.num_refused == len(drawn) - 3
