"""Whole runs whose generation goes ahead of training: on one pool, on pools of their own, and killed in the middle."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from tests.metric_names import unexplained
from tests.ray.learned_prompts import learned
from tests.ray.processes import training, wait_until
from tests.ray.runs import Toy, metrics_of, trained

NUM_PROMPTS = 40
AHEAD = (
    "algorithm=tests.ray.learned_prompts:RecordedGRPO",
    "algorithm.responses_per_prompt=2",
    "run.total_steps=10",  # of 4 prompts: one pass over all 40
    "actor.tokens_per_microbatch=256",
)
APART = ("placement.pools={main: 1x1, generation: 1x1, scoring: 1x1 cpu}", "placement.roles.rollout=generation")


@pytest.mark.slow
@pytest.mark.parametrize("pools", [(), APART], ids=["shared", "apart"])
def test_generation_ahead_of_training_is_as_old_as_allowed_and_learns_from_every_prompt_once(
    toy: Toy, cluster: None, tmp_path: Path, pools: tuple[str, ...]
) -> None:
    validation = (f"data.validation_files=[{toy.data}]", "validation.every_steps=4")
    steps = trained(toy, tmp_path, *AHEAD, *pools, *validation, "loop.max_staleness=2")
    assert not unexplained(name for line in steps for name in line)
    assert learned(tmp_path) == list(range(NUM_PROMPTS))
    ages = [step["staleness/max"] for step in steps if "staleness/max" in step]
    assert max(ages) == 2 and len(ages) == 10
    assert all(step["stream/groups_outstanding"] <= 8 for step in steps if "stream/groups_outstanding" in step)
    assert any("validation/reward/mean" in step for step in steps)


@pytest.mark.slow
def test_after_kills_at_random_points_every_prompt_is_learned_from_once(
    toy: Toy, cluster: None, forking: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "run"
    settings = [*AHEAD, *APART, "loop.max_staleness=2", "checkpoint.every_steps=1"]
    for number, step in enumerate(sorted(rng.choice(np.arange(1, 10), 5, replace=False).tolist())):
        with training(
            [str(toy.config), *settings, f"run.folder={folder}"], tmp_path / f"killed{number}.log", forking=forking
        ) as run:
            run.wait_for(folder / "learned" / f"{step:03d}.json")
            time.sleep(float(rng.uniform(0.0, 0.4)))
            run.kill()
            wait_until(lambda: not run.working(), lambda: f"outlived the driver: {run.working()}", timeout_s=30)
    trained(toy, folder, *settings)
    assert learned(folder) == list(range(NUM_PROMPTS))
    assert [line["step"] for line in metrics_of(folder)] == list(range(1, 11))
