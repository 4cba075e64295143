"""From what ranks answer about their GPUs to the configuration that each role is built from."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from hybridflow.config.schema import Config, ModelConfig, PlacementConfig, RunConfig, TrainingConfig
from hybridflow.controller.group import Pool
from hybridflow.controller.placement import RolePlace, places
from hybridflow.controller.planning import RunPlan, ask, decide
from hybridflow.errors import PlacementError
from hybridflow.planner.memory import GIB, Gpu
from hybridflow.workers.hardware import HardwareInfo
from tests.model_sizes import HALF_BILLION

pytestmark = pytest.mark.usefixtures("cluster")

ROLES = ("data", "actor", "critic", "rollout", "reference", "reward")


@ray.remote(num_cpus=0)
class FakeRank:
    """Answers like the process of a rank with a GPU of `gib` GiB."""

    def __init__(self, gib: float):
        self.gib = gib

    def hardware_info(self, config: Config, roles: frozenset[str]) -> HardwareInfo:
        """Sizes for the first rank alone."""
        with_models = roles & {"actor", "critic", "reference", "rollout"}
        return HardwareInfo(Gpu(total=int(self.gib * GIB), free=int(self.gib * GIB)), dict.fromkeys(with_models, HALF_BILLION))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    placement = PlacementConfig(pools={"main": "1x2", "scoring": "1x1 cpu"})
    run = RunConfig(folder=str(tmp_path), total_steps=100)
    return Config(model=ModelConfig(path="0.5b"), placement=placement, run=run)


def planned(config: Config, *gib: float, device: str = "cuda") -> RunPlan:
    """The plan for a pool `main` of GPUs of these sizes; CPU slots are asked nothing."""
    placed: dict[str, RolePlace] = places(config, ROLES)
    ranks = [FakeRank.remote(size) for size in gib]
    pools = {"main": Pool("main", ranks, ["here"] * len(ranks)), "scoring": Pool("scoring", [], [])}
    return decide(config, placed, ask(config, placed, pools, device))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="hybridflow"):
        yield caplog


def test_what_fits_stays_and_the_log_says_so(config: Config, log: pytest.LogCaptureFixture) -> None:
    plan = planned(config, 139.8, 139.8)
    assert not plan.decisions.options and plan.engine_sleeps is False
    assert plan.config_of("actor").actor.offload_optimizer is False
    assert "memory of pool 'main' fits" in log.text and "nothing is offloaded, slept or recomputed" in log.text


def test_the_smallest_gpu_of_a_pool_decides(config: Config, log: pytest.LogCaptureFixture) -> None:
    plan = planned(config, 139.8, 20.0)
    assert "actor.gradient_checkpointing" in plan.decisions.options
    assert plan.config_of("actor").model.gradient_checkpointing is True
    assert "of 20.0 GiB at the peak" in log.text


def test_what_fits_nowhere_is_refused(config: Config) -> None:
    with pytest.raises(PlacementError, match="Nothing was loaded"):
        planned(config, 8.0, 8.0)


def test_on_a_cpu_nothing_is_asked_and_everything_is_off(config: Config, log: pytest.LogCaptureFixture) -> None:
    plan = planned(config, 8.0, 8.0, device="cpu")
    assert plan.config_of("actor").model.gradient_checkpointing is False
    assert plan.engine_sleeps is False and not log.text


def test_switches_that_are_all_set_are_not_planned(config: Config) -> None:
    trained = TrainingConfig(
        offload_parameters=False, offload_optimizer=False, shard_gradients=False, tokens_per_microbatch=8192
    )
    decided = replace(
        config,
        model=replace(config.model, gradient_checkpointing=False, compile=False, logits_chunk_tokens=4096),
        actor=trained,
        critic=trained,
        reference=replace(config.reference, offload_parameters=False, tokens_per_microbatch=8192),
        rollout=replace(config.rollout, sleep=True, gpu_memory_utilization=0.5),
    )
    assert planned(decided, 8.0, 8.0).engine_sleeps is True  # 8 GiB would be refused
