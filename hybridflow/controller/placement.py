"""Which role runs where: pools become placement groups, ranks become processes on them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridflow import registry
from hybridflow.config.pools import PoolSize, parse_pool
from hybridflow.config.schema import Config
from hybridflow.controller.group import Pool
from hybridflow.controller.rank_process import RankPlace, RankProcess
from hybridflow.controller.waiting import bounded, jobs_of, results_of, told
from hybridflow.errors import PlacementError
from hybridflow.parallel.addresses import environment_of_one_machine
from hybridflow.workers.base import Worker

logger = logging.getLogger("hybridflow")

QUICK_PLACEMENT_S = 5.0
# Long enough for a cluster that adds nodes on demand, short enough to say what is missing.
PLACEMENT_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
"""For Ray's own services, which answer in milliseconds."""


@dataclass(frozen=True)
class RolePlace:
    """Where a role runs and what it is."""

    role: str
    pool: str
    size: PoolSize
    class_name: str
    worker_class: type[Worker]


def places(config: Config, roles: tuple[str, ...]) -> dict[str, RolePlace]:
    """The pool and class of every role, from the configuration alone. Imports the worker classes."""
    default_pool = next(iter(config.placement.pools))
    found = {}
    for role in roles:
        class_name = config.placement.workers.get(role, role)
        worker_class = registry.load(class_name, registry.ROLES, key=f"placement.workers.{role}")
        assert isinstance(worker_class, type) and issubclass(worker_class, Worker), f"{class_name} is not a Worker"
        pool = config.placement.roles.get(role, default_pool)
        found[role] = RolePlace(role, pool, parse_pool(config.placement.pools[pool]), class_name, worker_class)
    return found


def placement_lines(config: Config, roles: tuple[str, ...]) -> list[str]:
    """One line per role: which class runs on which pool, with how many ranks, sharded how."""
    lines = []
    for place in places(config, roles).values():
        layout = place.worker_class.layout_of(config, place.size.num_ranks)
        is_on_cpu = place.size.is_cpu or config.run.device == "cpu"
        unit = "CPU slot" if is_on_cpu else "GPU" if config.run.device == "cuda" else "rank"
        sizes = {"data": layout.data, "sequence": layout.sequence, "tensor": layout.tensor}
        axes = "".join(f", {axis} parallel {size}" for axis, size in sizes.items() if size > 1)
        shape = f"{place.size.nodes} node(s) x {place.size.ranks_per_node} {unit}(s)"
        lines.append(f"{place.role:>10} on pool '{place.pool}': {shape}{axes} [{place.worker_class.__name__}]")
    return lines


def device_type(config: Config) -> str:
    """What ranks compute on: `run.device`, with auto resolved by what this machine, or the cluster, has."""
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"


def start_pool(
    name: str,
    size: PoolSize,
    device: str,
    environment: Mapping[str, str],
    user_files: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> tuple[Pool, PlacementGroup]:
    """Reserve a CPU, and where ranks have one a GPU, for each rank of the pool, and start its process.

    Raises:
        PlacementError: the cluster does not have them.
    """
    resources = {"CPU": 1.0} if size.is_cpu or device == "cpu" else {"CPU": 1.0, "GPU": 1.0}
    bundles = [{kind: amount * size.ranks_per_node for kind, amount in resources.items()} for _ in range(size.nodes)]
    group = placement_group(bundles, strategy="STRICT_SPREAD" if size.nodes > 1 else "PACK", name=f"hybridflow-{name}")
    if not _given(group, QUICK_PLACEMENT_S):
        logger.info("pool '%s' waits for %s on %d node(s) of the cluster", name, _amounts(size, resources), size.nodes)
    if not _given(group, PLACEMENT_TIMEOUT_S):
        remove_placement_group(group)
        raise PlacementError(_shortage(name, size, resources))
    processes = []
    for rank in range(size.num_ranks):
        place = RankPlace(
            pool=name,
            rank=rank,
            num_ranks=size.num_ranks,
            ranks_per_node=size.ranks_per_node,
            device_type="cpu" if size.is_cpu else device,
            environment=dict(environment),
            folder=os.getcwd(),
            user_files=tuple(user_files),
            imports=tuple(imports),
        )
        processes.append(_start_rank(place, group, resources))
    return Pool(name, processes), group


@told("starting the processes of the run")
def introduce(pools: Sequence[Pool], timeout_s: float) -> None:
    """Wait until the processes of all pools have come up, and let ranks that are all on one machine meet on it alone."""
    asked = [jobs_of(pool, f"pool '{pool.name}'", "start", [p.identity.remote() for p in pool.processes]) for pool in pools]
    for pool in pools:
        pool.others = list(pools)
    results_of({reference: job for jobs in asked for reference, job in jobs.items()}, timeout_s)
    for pool, jobs in zip(pools, asked, strict=True):
        pool.identities = ray.get(list(jobs))
        counts = Counter(pool.nodes).items()
        logger.info("pool '%s': %s", pool.name, ", ".join(f"{count} rank(s) on {node}" for node, count in counts))
    if len({identity.node_id for pool in pools for identity in pool.identities}) == 1:
        for process in (process for pool in pools for process in pool.processes):
            process.set_environment.remote(environment_of_one_machine())


def _given(group: PlacementGroup, limit_s: float) -> bool:
    """Whether the cluster gives the places within this time; it may not answer at all."""
    return bounded(lambda: bool(group.wait(limit_s)), limit_s + ANSWER_TIMEOUT_S, "waiting for places in the cluster")


def _start_rank(place: RankPlace, group: PlacementGroup, resources: Mapping[str, float]) -> ActorHandle[RankProcess]:
    node = place.rank // place.ranks_per_node
    actor_class = ray.remote(RankProcess).options(
        num_cpus=resources["CPU"],
        num_gpus=resources.get("GPU", 0),
        scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node),
    )
    return cast("ActorHandle[RankProcess]", actor_class.remote(place))


def _amounts(size: PoolSize, resources: Mapping[str, float]) -> str:
    """What a pool takes of each node."""
    return " and ".join(f"{amount * size.ranks_per_node:g} {kind}s" for kind, amount in resources.items())


def _shortage(name: str, size: PoolSize, resources: Mapping[str, float]) -> str:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return (
        f"pool '{name}' asks for {size.nodes} node(s) with {_amounts(size, resources)} each. After {PLACEMENT_TIMEOUT_S:g} s "
        f"the cluster had not given them; it has {len(nodes)} node(s): {found} (some may be in use). {_remedy(name, size)}"
    )


def _remedy(name: str, size: PoolSize) -> str:
    """What can be done about a pool that does not fit: of one rank there is no smaller one."""
    ways = [f"make placement.pools.{name} smaller"] if size.num_ranks > 1 else []
    ways += ["end what else runs on the cluster", "add nodes", "or share a pool between roles (placement.roles)"]
    text = ", ".join(ways)
    return text[0].upper() + text[1:]
