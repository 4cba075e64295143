"""The estimates of the plan against the peaks that runs on H200 have recorded."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from hybridflow import registry
from hybridflow.config.load import load_config
from hybridflow.config.schema import Config
from hybridflow.planner.measures import choose
from hybridflow.planner.memory import GIB, Gpu, PoolNeeds, peak
from hybridflow.planner.needs import PoolFacts, pool_needs
from hybridflow.workers.facts import model_sizes

ROOT = Path(__file__).resolve().parents[2]
H200 = Gpu(total=int(139.8 * GIB), free=int(139.3 * GIB))
RECORDED = {"W1": (0.5, 32), "W2": (0.5, 256), "W3": (0.5, 512), "W4": (7, 1024), "W1_two_pools": (0.5, 32)}
"""Run -> billions of parameters, rows of an update."""
TOLERANCE = 0.06
"""Estimates may exceed the record by this. What was seen: 4.1, 3.8, 4.1, 4.7 and 3.0 % in the order of `RECORDED`; of the last,
EAGER_EXCESS was chosen to give that."""


def recorded(name: str) -> dict[str, object]:
    """The raw result of a run."""
    read: dict[str, object] = json.loads((ROOT / f"benchmarks/results/ppo_step_{name}.json").read_text())
    return read


def config_of(name: str, folder: Path) -> Config:
    """The configuration of a recorded command, with a model folder that holds sizes only."""
    SHAPES["0.5b" if RECORDED[name][0] == 0.5 else "7b"].config().save_pretrained(folder)
    for file in ("model.safetensors", "tokenizer.json", "prompts.parquet"):
        (folder / file).touch()
    _, _, _, path, *overrides = shlex.split(str(recorded(name)["command"]))
    here = [f"model.path={folder}", f"model.tokenizer={folder}", f"data.train_files=[{folder / 'prompts.parquet'}]"]
    here += [f"reward.path={ROOT / 'benchmarks/parity_reward.py'}", "run.device=cpu", "placement.cpu_slots=16"]
    return load_config(str(ROOT / path), [*overrides, *here, "rollout.engine=torch"])


def main_pool(config: Config) -> PoolNeeds:
    """What the pool of the trained models needs."""
    algorithm = registry.load(config.algorithm.name, registry.ALGORITHMS, key="algorithm.name")
    every: tuple[str, ...] = algorithm.roles(config)  # type: ignore[attr-defined]
    roles = tuple(role for role in every if config.placement.roles.get(role, "main") == "main")
    num_ranks = int(config.placement.pools["main"].partition("x")[2])
    sizes = model_sizes(config, frozenset(roles))
    facts = PoolFacts(pool="main", roles=roles, num_ranks=num_ranks, gpu=H200, sizes=sizes)
    return pool_needs(config, facts, set(every))


@pytest.mark.parametrize("name", RECORDED)
def test_the_estimated_peak_is_near_the_recorded_one(name: str, tmp_path: Path) -> None:
    needs = main_pool(config_of(name, tmp_path))
    steps = recorded(name)["steps"]
    assert isinstance(steps, list)
    # The budget of a microbatch is an upper bound; W1's updates are smaller than it.
    tokens = RECORDED[name][1] * (steps[0]["prompt/tokens_mean"] + steps[0]["response/tokens_mean"]) / needs.num_ranks
    as_run = replace(needs, models=tuple(replace(model, tokens=min(model.tokens, round(tokens))) for model in needs.models))
    plan = choose(needs)
    assert plan is not None
    estimated = peak(as_run, plan.measures).total / GIB
    measured = max(step["memory/peak_allocated_gib"] for step in steps)
    assert measured <= estimated <= measured * (1 + TOLERANCE), f"estimated {estimated:.2f}, measured {measured:.2f} GiB"


@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W1_two_pools"])
def test_small_models_on_a_large_gpu_need_no_measures(name: str, tmp_path: Path) -> None:
    plan = choose(main_pool(config_of(name, tmp_path)))
    assert plan is not None and plan.measures == frozenset()


def test_w4_is_feasible_as_it_was_run_and_the_plan_alone_would_do_the_same(tmp_path: Path) -> None:
    config = config_of("W4", tmp_path)
    for gradient_checkpointing in (True, "auto"):
        plan = choose(main_pool(replace(config, model=replace(config.model, gradient_checkpointing=gradient_checkpointing))))
        assert plan is not None and plan.measures == {"actor.gradient_checkpointing"}
