"""From a configuration to running groups: start the pools, build the workers."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TypeVar

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from hybridflow import interrupts, registry
from hybridflow.algorithms.base import Algorithm
from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller import planning
from hybridflow.controller.cost import CallLog
from hybridflow.controller.group import GroupDispatcher, Pool
from hybridflow.controller.placement import RolePlace, device_type, introduce, places, start_pool
from hybridflow.controller.waiting import Jobs, all_stacks, bounded, jobs_of, results_of, told
from hybridflow.data.loader import check_columns, check_sources
from hybridflow.errors import HybridflowError
from hybridflow.rewards.ground_truths import is_scored_by_rules
from hybridflow.user_file import split_name
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.data import DataSummary, DataWorker
from hybridflow.workers.remote import Future
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.reward_model import RewardModelWorker
from hybridflow.workers.rollout import RolloutWorker

logger = logging.getLogger("hybridflow")
W = TypeVar("W", bound=Worker)

CLOSING_TIMEOUT_S = 5.0
"""For what ranks do before they are killed, when the run has failed."""
ENDING_TIMEOUT_S = 20.0
"""For Ray to kill them."""


@dataclass(frozen=True)
class Launched:
    """A run's groups, by role, what their calls cost, and what the data group has found in the files."""

    groups: dict[str, Worker]
    places: dict[str, RolePlace]
    log: CallLog
    dataset: DataSummary
    engine_sleeps: bool
    """Whether engines give their memory to training: as configured, or as the plan decided."""
    all_stacks: Callable[[], str] = lambda: ""
    """What every rank does now, for people."""
    keep_plan: Callable[[], None] = lambda: None
    """Notes in the run's folder what was decided, when that is this run's."""

    @property
    def data(self) -> DataWorker:
        """The group that reads the dataset."""
        data = self._role("data", DataWorker)
        assert data is not None, "every run has the role 'data'"
        return data

    @property
    def actor(self) -> ActorWorker | None:
        """The group that trains the policy, where the algorithm has one."""
        return self._role("actor", ActorWorker)

    @property
    def rollout(self) -> RolloutWorker | None:
        """The group that generates, where the algorithm has one."""
        return self._role("rollout", RolloutWorker)

    @property
    def validation(self) -> RolloutWorker | None:
        """The engines that generate for validation alone, where validation is concurrent."""
        return self._role("validation", RolloutWorker)

    @property
    def reward(self) -> RewardWorker | None:
        """The group that scores, where the algorithm has one."""
        return self._role("reward", RewardWorker)

    @property
    def reward_model(self) -> RewardModelWorker | None:
        """The group whose score is part of every reward; None where there is none, or where it is what is trained."""
        return self._role("reward_model", RewardModelWorker) if "reward" in self.groups else None

    def _role(self, role: str, kind: type[W]) -> W | None:
        worker = self.groups.get(role)
        assert worker is None or isinstance(worker, kind), f"role {role!r} is no {kind.__name__}"
        return worker


def algorithm_class(config: Config) -> type[Algorithm]:
    """The class that `algorithm.name` names."""
    loaded = registry.load(config.algorithm.name, registry.ALGORITHMS, key="algorithm.name")
    assert isinstance(loaded, type) and issubclass(loaded, Algorithm), f"{config.algorithm.name} is not an Algorithm"
    return loaded


def all_roles(config: Config) -> tuple[str, ...]:
    """The roles of a run: the dataset's, and those that the algorithm declares."""
    return ("data", *algorithm_class(config).roles(config))


def check_files(config: Config) -> None:
    """Raises ConfigError where a data file on this machine lacks a column, or has rows of a source that no reward is for; a
    data worker of the user's may read other ones."""
    if "data" in config.placement.workers:
        return
    algorithm = algorithm_class(config)
    check_columns(config, algorithm.rows)
    if is_scored_by_rules(config, algorithm.roles(config)):
        check_sources(config, algorithm.rows)


@contextmanager
def launched(config: Config) -> Iterator[Launched]:
    """Every role of the algorithm on its pool; all processes end with the block."""
    log = CallLog()
    placed = places(config, all_roles(config))
    device = device_type(config)
    pools: dict[str, Pool] = {}
    reserved: list[PlacementGroup] = []
    try:
        for name in dict.fromkeys(place.pool for place in placed.values()):
            members = [place for place in placed.values() if place.pool == name]
            imports = dict.fromkeys(name for place in members for name in place.worker_class.imports(config))
            environment = _environment(config)
            pools[name], group = start_pool(name, members[0].size, device, environment, user_files(config), list(imports))
            reserved.append(group)
        threading.Thread(target=import_module, args=("torch",), daemon=True, name="imports").start()  # for advantages, soon
        introduce(list(pools.values()), config.run.timeout_s)
        # Pools build at the same time; within one, roles follow each other in this order. The data role needs no plan.
        home = placed["data"].pool
        groups, building, opening = {"data": _group(config, placed["data"], pools[home], log)}, dict[str, Jobs](), None
        for name in sorted(pools, key=lambda name: name != home):
            _connect(pools[name], [place for place in placed.values() if place.pool == name], config.run)
            if opening is None:
                building["data"] = _start_building(config, placed["data"], pools[name])
                opening = _opening(groups["data"], algorithm_class(config))
        asked = planning.ask(config, placed, pools, device)
        for name, references in asked.items():
            logger.info("finding out what the GPUs of pool '%s' hold", name)
            results_of(jobs_of(pools[name], f"pool '{name}'", "hardware_info", references), config.run.timeout_s)
        plan = planning.decide(config, placed, asked)
        for place in placed.values():
            if place.role not in building:
                building[place.role] = _start_building(plan.config_of(place.role), place, pools[place.pool])
        groups |= {role: _group(config, place, pools[place.pool], log) for role, place in placed.items() if role not in groups}
        results_of(building.pop("data"), config.run.timeout_s)
        assert opening is not None, "the data role has a pool"
        dataset = opening.result()  # mistakes in the data are told while models still load
        with told("loading models and starting engines"):
            results_of({reference: job for jobs in building.values() for reference, job in jobs.items()}, config.run.timeout_s)
        try:
            stacks = partial(all_stacks, list(pools.values()))
            yield Launched(groups, placed, log, dataset, plan.engine_sleeps, stacks, plan.keep)
        except BaseException:
            interrupts.seen()
            _close_quickly(groups)
            raise
        for worker in groups.values():
            worker.close()
    except BaseException:
        interrupts.seen()
        raise
    finally:
        _end(list(pools.values()), reserved)


def _close_quickly(groups: Mapping[str, Worker]) -> None:
    """Close the workers that answer soon; what went wrong before is what the user is to read."""
    deadline = time.monotonic() + CLOSING_TIMEOUT_S
    with suppress(HybridflowError, ray.exceptions.RayError, RuntimeError):
        calls = [worker.close.start() for worker in groups.values()]
        while time.monotonic() < deadline and not interrupts.is_urgent() and not all(call.done() for call in calls):
            time.sleep(0.05)


def _end(pools: Sequence[Pool], reserved: Sequence[PlacementGroup]) -> None:
    """Kill the processes and give back their places. Where Ray does not answer any more there is nothing to give back."""

    def give_back() -> None:
        for pool in pools:
            pool.end()
        for group in reserved:
            remove_placement_group(group)

    try:
        bounded(give_back, ENDING_TIMEOUT_S, "ending the processes of the run")
    except (HybridflowError, ray.exceptions.RayError, RuntimeError) as error:
        logger.warning("the processes of the run were not ended in order: %s", str(error).partition("\n")[0])


@told("importing libraries and joining")
def _connect(pool: Pool, members: list[RolePlace], run: RunConfig) -> None:
    """Let the ranks of a pool meet, where one of its roles talks through torch.distributed."""
    if any(place.worker_class.is_distributed for place in members):
        logger.info("the ranks of pool '%s' import their libraries and join", pool.name)
        name = f"pool '{pool.name}'"
        first = [process.rendezvous_address.remote() for process in pool.processes[:1]]
        address: str = results_of(jobs_of(pool, name, "rendezvous_address", first), run.timeout_s)[0]
        joining = [process.connect.remote(address, run.peer_timeout_s) for process in pool.processes]
        results_of(jobs_of(pool, name, "connect", joining), run.timeout_s)


def _start_building(config: Config, place: RolePlace, pool: Pool) -> Jobs:
    """Let all ranks build their worker of a role from `config`, in which the plan has decided what was left to it."""
    layout = place.worker_class.layout_of(config, place.size.num_ranks)
    logger.info("building %s on pool '%s' (%d rank(s))", place.role, place.pool, place.size.num_ranks)
    started = [process.create.remote(place.role, place.class_name, config, layout) for process in pool.processes]
    return jobs_of(pool, place.role, "__init__", started)


def _opening(data: Worker, algorithm: type[Algorithm]) -> Future[DataSummary]:
    """Have the files read while the other roles still start."""
    assert isinstance(data, DataWorker)
    return data.open.start(algorithm.rows)


def _group(config: Config, place: RolePlace, pool: Pool, log: CallLog) -> Worker:
    """The controller's handle for the workers of a role."""
    layout = place.worker_class.layout_of(config, place.size.num_ranks)
    return place.worker_class.group(GroupDispatcher(place.role, pool, layout, timeout_s=config.run.timeout_s, log=log))


def user_files(config: Config) -> list[str]:
    """The files of `path/to/file.py:Class` in the configuration, whose classes travel between processes."""
    named = [config.algorithm.name, *config.placement.workers.values()]
    return [in_file[0] for name in named if (in_file := split_name(name))]


def _environment(config: Config) -> dict[str, str]:
    """What every rank's process is started with."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": str(config.run.seed)}
    # Threads that wait for others spin by default, and take the cores from the ranks beside them.
    environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
    # torch warns of host names that it cannot look up, which it does not need.
    environment |= {"TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    # How many threads add up a sum changes its last digits: a number that the user gives holds on every machine.
    num_threads = os.environ.get("OMP_NUM_THREADS", "")
    return environment | ({"OMP_NUM_THREADS": num_threads} if num_threads.isdigit() and int(num_threads) else {})
