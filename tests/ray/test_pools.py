"""Where roles run changes nothing about what is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.conftest import SharedCluster
from tests.ray.runs import Toy, trained

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

TRAINING = ("run.total_steps=3", "algorithm.prompts_per_update=2", "data.prompts_per_step=6")
AGREEMENT = 1e-4
"""Nats by which an engine with the trainer's weights may differ in float32."""
MEASURES_THE_SPLIT = ("seconds/", "sync/", "memory/", "controller/", "mismatch/", "time", "tokens_per_second")


@pytest.fixture(scope="module")
def on_one_rank(toy: Toy, shared_cluster: SharedCluster, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """Metrics of the training with one trainer rank, which generates too."""
    shared_cluster.become("forked")
    return trained(toy, tmp_path_factory.mktemp("one_rank"), *TRAINING)


@pytest.mark.parametrize(
    ("pools", "roles"),
    [
        ("{main: 1x2, scoring: 1x1 cpu}", "{data: scoring, reward: scoring}"),
        ("{main: 1x1, gen: 1x1, scoring: 1x1 cpu}", "{rollout: gen, data: scoring, reward: scoring}"),
        ("{main: 1x2, gen: 1x1, scoring: 1x1 cpu}", "{rollout: gen, data: scoring, reward: scoring}"),
        ("{main: 1x1, values: 1x1, scoring: 1x2 cpu}", "{critic: values, data: scoring, reward: scoring}"),
    ],
    ids=["two ranks", "rollout apart", "two ranks, rollout apart", "critic apart, two ranks score"],
)
def test_every_placement_trains_alike(
    toy: Toy, on_one_rank: list[dict[str, float]], tmp_path: Path, pools: str, roles: str
) -> None:
    lines = trained(toy, tmp_path, *TRAINING, f"placement.pools={pools}", f"placement.roles={roles}")
    assert len(lines) == 3
    assert all(line["mismatch/max"] < AGREEMENT for line in lines)
    for ours, theirs in zip(lines, on_one_rank, strict=True):
        numbers = {name for name in ours.keys() & theirs.keys() if not name.startswith(MEASURES_THE_SPLIT)}
        assert {"actor/loss", "actor/grad_norm", "critic/loss", "critic/grad_norm", "kl/mean", "reward/mean"} <= numbers
        assert {name: ours[name] for name in numbers} == pytest.approx(
            {name: theirs[name] for name in numbers}, rel=1e-4, abs=1e-6
        )
