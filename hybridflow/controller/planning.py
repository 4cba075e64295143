"""What stays on the GPUs and how much goes through a model at once: asking the ranks for sizes, and giving every role a
configuration in which that is decided."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray

from hybridflow.checkpoint.plan_note import PlanNote, read_note
from hybridflow.checkpoint.resume import goes_on_in_its_folder
from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.config.schema import Config
from hybridflow.controller.group import Pool
from hybridflow.controller.placement import RolePlace
from hybridflow.planner.decisions import Decisions, resolved
from hybridflow.planner.memory import Gpu
from hybridflow.planner.needs import PoolInfo, compiling_pays, is_open, pool_needs
from hybridflow.planner.refusal import plan_all
from hybridflow.planner.search import fingerprint
from hybridflow.workers.hardware import HardwareInfo

logger = logging.getLogger("hybridflow")

HardwareAnswers = dict[str, list["ray.ObjectRef[HardwareInfo]"]]
"""What the ranks of each pool that is planned will answer."""


@dataclass(frozen=True)
class RunPlan:
    """What was decided for all pools."""

    config: Config
    decisions: Decisions
    note: PlanNote | None = None

    def keep(self) -> None:
        """Note it in the run's folder. A start that is refused leaves the folder as it was."""
        if self.note is not None:
            self.note.write(Path(self.config.run.folder))

    def config_of(self, role: str) -> Config:
        """The configuration that workers of `role` are built from: nothing in it is left to a plan."""
        return resolved(self.config, self.decisions, role)

    @property
    def engine_sleeps(self) -> bool:
        return bool(resolved(self.config, self.decisions).rollout.sleep)


def ask(config: Config, placed: Mapping[str, RolePlace], pools: Mapping[str, Pool], device: str) -> HardwareAnswers:
    """Start to ask the ranks of each pool with GPUs for which something is left to the plan; the first also for sizes."""
    asked: HardwareAnswers = {}
    for name, pool in pools.items():
        members = _members(placed, name)
        is_on_gpu = device == "cuda" and not next(iter(members.values())).size.is_cpu
        if is_on_gpu and is_open(config, members.keys()):
            roles = [frozenset(members), *[frozenset[str]()] * (len(pool.processes) - 1)]
            asked[name] = [
                process.hardware_info.remote(config, own) for process, own in zip(pool.processes, roles, strict=True)
            ]
    return asked


def decide(config: Config, placed: Mapping[str, RolePlace], asked: HardwareAnswers) -> RunPlan:
    """The cheapest options with which every pool that was asked holds its roles, and the sizes that are fastest with them; the
    log says which and why. A run that goes on from a checkpoint in its folder takes what it has decided there, where that still
    holds; one that begins decides anew.

    Raises:
        PlacementError: a pool cannot hold its roles, whatever is offloaded.
    """
    if not asked:
        return RunPlan(config, Decisions())
    found = {name: ray.get(answers) for name, answers in asked.items()}
    infos = [_pool_info(name, placed, answers) for name, answers in found.items()]
    folder = Path(config.run.folder)
    goes_on = goes_on_in_its_folder(CheckpointStore(folder, resume=config.checkpoint.resume))
    note = read_note(folder) if goes_on else PlanNote()
    num_rows = next((answers[0].num_training_rows for answers in found.values() if answers[0].num_training_rows), None)
    is_left_open = config.model.compile == "auto"
    before = note.is_compiled if is_left_open else None
    is_compiled = compiling_pays(config, infos, num_rows) if before is None else before
    needs = [pool_needs(config, info, placed.keys(), is_compiled=is_compiled) for info in infos]
    decisions = Decisions(is_compiled=is_compiled)
    plans = plan_all(needs, note.pools)
    for plan in plans:
        decisions |= plan.decisions
        for line in plan.lines():
            logger.info(line)
    if is_left_open:
        gains = "gains at least twice the minute" if is_compiled else "is too short to gain twice the minute"
        why = f"the run {gains} that compiling takes" if before is None else "as decided before"
        logger.info("model.compile is %s: %s", "on" if is_compiled else "off", why)
    made = {fingerprint(own): plan.decisions for own, plan in zip(needs, plans, strict=True)}
    return RunPlan(config, decisions, PlanNote(is_compiled=is_compiled if is_left_open else None, pools=made))


def _pool_info(name: str, placed: Mapping[str, RolePlace], found: list[HardwareInfo]) -> PoolInfo:
    """Of a pool with GPUs of several sizes, the smallest counts."""
    gpu = Gpu(total=min(rank.gpu.total for rank in found), free=min(rank.gpu.free for rank in found))
    return PoolInfo(name=name, roles=tuple(_members(placed, name)), num_ranks=len(found), gpu=gpu, sizes=found[0].sizes)


def _members(placed: Mapping[str, RolePlace], pool: str) -> dict[str, RolePlace]:
    return {role: place for role, place in placed.items() if place.pool == pool}
