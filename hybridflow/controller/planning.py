"""What stays on the GPUs: asking the ranks for sizes, and giving every role a configuration in which that is decided."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from hybridflow.config.schema import Config
from hybridflow.controller.group import Pool
from hybridflow.controller.placement import RolePlace
from hybridflow.planner.memory import Gpu
from hybridflow.planner.needs import PoolInfo, has_open_switches, pool_needs, resolved
from hybridflow.planner.options import choose_all
from hybridflow.workers.hardware import HardwareInfo

logger = logging.getLogger("hybridflow")

Asked = dict[str, list["ray.ObjectRef[HardwareInfo]"]]
"""What the ranks of each pool that is planned will answer."""


@dataclass(frozen=True)
class RunPlan:
    """What was decided for all pools."""

    config: Config
    options: frozenset[str]

    def config_of(self, role: str) -> Config:
        """The configuration that workers of `role` are built from: every switch is on or off."""
        return resolved(self.config, self.options, role)

    @property
    def engine_sleeps(self) -> bool:
        return bool(resolved(self.config, self.options).rollout.sleep)


def ask(config: Config, placed: Mapping[str, RolePlace], pools: Mapping[str, Pool], device: str) -> Asked:
    """Start to ask the ranks of each pool with GPUs for which something is left to the plan; the first also for sizes."""
    asked: Asked = {}
    for name, pool in pools.items():
        members = _members(placed, name)
        is_on_gpu = device == "cuda" and not next(iter(members.values())).size.is_cpu
        if is_on_gpu and has_open_switches(config, members.keys()):
            roles = [frozenset(members), *[frozenset[str]()] * (len(pool.processes) - 1)]
            asked[name] = [
                process.hardware_info.remote(config, own) for process, own in zip(pool.processes, roles, strict=True)
            ]
    return asked


def decide(config: Config, placed: Mapping[str, RolePlace], asked: Asked) -> RunPlan:
    """The cheapest options with which every pool that was asked holds its roles; the log says which and why.

    Raises:
        PlacementError: one of them cannot, whatever is offloaded.
    """
    needs = [pool_needs(config, _pool_info(name, placed, ray.get(answers)), placed.keys()) for name, answers in asked.items()]
    plans = choose_all(needs)
    for plan in plans:
        for line in plan.lines():
            logger.info(line)
    return RunPlan(config, frozenset(option for plan in plans for option in plan.options))


def _pool_info(name: str, placed: Mapping[str, RolePlace], found: list[HardwareInfo]) -> PoolInfo:
    """Of a pool with GPUs of several sizes, the smallest counts."""
    gpu = Gpu(total=min(rank.gpu.total for rank in found), free=min(rank.gpu.free for rank in found))
    return PoolInfo(name=name, roles=tuple(_members(placed, name)), num_ranks=len(found), gpu=gpu, sizes=found[0].sizes)


def _members(placed: Mapping[str, RolePlace], pool: str) -> dict[str, RolePlace]:
    return {role: place for role, place in placed.items() if place.pool == pool}
