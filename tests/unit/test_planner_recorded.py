"""The estimates of the plan against the peaks that runs on H200 have recorded."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks.shapes import SHAPES
from hybridflow import registry
from hybridflow.config.load import load_config
from hybridflow.config.schema import Config
from hybridflow.planner.memory import GIB, Gpu, PoolNeeds, peak
from hybridflow.planner.needs import PoolInfo, pool_needs
from hybridflow.planner.options import choose
from hybridflow.workers.hardware import model_sizes
from tests.unit.config_cases import CUTTING_ENGINE, LOOKS_LIKE_PARQUET

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What is known of a run beside its result."""

    billions: float = 0.5
    """Parameters."""
    rows: int
    """Of an update."""
    excess: float
    """What the estimate may exceed the record by; seen was up to a hundredth less."""
    free_gib: float = 139.3
    """Of the H200, before the run."""

    @property
    def gpu(self) -> Gpu:
        return Gpu(total=int(139.8 * GIB), free=int(self.free_gib * GIB))


RECORDED = {
    "W1": Recorded(rows=32, excess=0.05),
    "W2": Recorded(rows=256, excess=0.04),
    "W3": Recorded(rows=512, excess=0.04),
    "W1_two_pools": Recorded(rows=32, excess=0.04),  # EAGER_EXCESS was chosen to give that
    "W4": Recorded(billions=7, rows=1024, excess=0.06),
    "W4_shard_gradients": Recorded(billions=7, rows=1024, excess=0.09, free_gib=124.3),
    "W4_recomputed": Recorded(billions=7, rows=1024, excess=0.05),
}


def recorded(name: str) -> dict[str, object]:
    """The raw result of a run."""
    read: dict[str, object] = json.loads((ROOT / f"benchmarks/results/ppo_step_{name}.json").read_text())
    return read


def config_of(name: str, folder: Path) -> Config:
    """The configuration of a recorded command, with a model folder that holds sizes only."""
    SHAPES["0.5b" if RECORDED[name].billions == 0.5 else "7b"].config().save_pretrained(folder)
    for file in ("model.safetensors", "tokenizer.json"):
        (folder / file).touch()
    (folder / "prompts.parquet").write_bytes(LOOKS_LIKE_PARQUET)
    _, _, _, path, *overrides = shlex.split(str(recorded(name)["command"]))
    here = [f"model.path={folder}", f"model.tokenizer={folder}", f"data.train_files=[{folder / 'prompts.parquet'}]"]
    here += [f"reward.path={ROOT / 'benchmarks/parity_reward.py'}", "run.device=cpu", "placement.cpu_slots=16"]
    return load_config(str(ROOT / path), [*overrides, *here, CUTTING_ENGINE])


def main_pool(name: str, config: Config) -> PoolNeeds:
    """What the pool of the trained models needs in a recorded run."""
    algorithm = registry.load(config.algorithm.name, registry.ALGORITHMS, key="algorithm.name")
    every: tuple[str, ...] = algorithm.roles(config)  # type: ignore[attr-defined]
    roles = tuple(role for role in every if config.placement.roles.get(role, "main") == "main")
    num_ranks = int(config.placement.pools["main"].partition("x")[2])
    sizes = model_sizes(config, frozenset(roles))
    pool = PoolInfo(name="main", roles=roles, num_ranks=num_ranks, gpu=RECORDED[name].gpu, sizes=sizes)
    return pool_needs(config, pool, set(every))


@pytest.mark.parametrize("name", RECORDED)
def test_the_estimated_peak_is_near_the_recorded_one(name: str, tmp_path: Path) -> None:
    needs = main_pool(name, config_of(name, tmp_path))
    steps = recorded(name)["steps"]
    assert isinstance(steps, list)
    # The budget of a microbatch is an upper bound: it holds whole rows, and W1's updates are smaller.
    row = steps[0]["prompt/tokens_mean"] + steps[0]["response/tokens_mean"]
    num_rows = RECORDED[name].rows // needs.num_ranks
    models = tuple(replace(model, tokens=round(min(model.tokens // row, num_rows) * row)) for model in needs.models)
    as_run = replace(needs, models=models)
    plan = choose(needs)
    assert plan is not None
    estimated = peak(as_run, plan.options).total / GIB
    measured = max(step["memory/peak_allocated_gib"] for step in steps)
    assert measured <= estimated <= measured * (1 + RECORDED[name].excess), (
        f"estimated {estimated:.2f}, measured {measured:.2f} GiB"
    )


@pytest.mark.parametrize("name", ["W1", "W2", "W3", "W1_two_pools"])
def test_small_models_on_a_large_gpu_need_no_options(name: str, tmp_path: Path) -> None:
    plan = choose(main_pool(name, config_of(name, tmp_path)))
    assert plan is not None and plan.options == frozenset()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("W4", set()),
        ("W4_shard_gradients", {"actor.shard_gradients"}),
        ("W4_recomputed", {"actor.gradient_checkpointing"}),
    ],
)
def test_w4_is_feasible_as_it_was_run_and_the_plan_alone_would_do_the_same(
    name: str, options: set[str], tmp_path: Path
) -> None:
    config = config_of(name, tmp_path)
    for gradient_checkpointing in ("actor.gradient_checkpointing" in options, "auto"):
        model = replace(config.model, gradient_checkpointing=gradient_checkpointing)
        plan = choose(main_pool(name, replace(config, model=model)))
        assert plan is not None and plan.options == options
