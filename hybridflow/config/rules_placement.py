"""Rules about pools, roles, ranks, and the slots of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from hybridflow import registry
from hybridflow.config.pools import PoolSize, cpu_slots_of_this_machine, gpus_of_this_machine, parse_pool
from hybridflow.config.schema import Config
from hybridflow.errors import Mistake, PlacementError
from hybridflow.registry import nearest

SEQUENCE_PARALLEL_ROLES = ("actor", "critic", "reference")


def pools_are_well_formed(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """There is a pool, and each size reads as nodes x ranks per node."""
    if not config.placement.pools:
        yield Mistake("placement.pools", "is empty; name at least one pool, for example main: 1x1")
    for name, text in config.placement.pools.items():
        try:
            parse_pool(text)
        except PlacementError as error:
            yield Mistake(f"placement.pools.{name}", str(error))


def roles_have_pools(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """Every role that is placed exists, on a pool that exists."""
    pools = config.placement.pools
    known = {*registry.ROLES, *config.placement.workers, *roles}
    for role, pool in config.placement.roles.items():
        if role not in known:
            problem = f"no role is called {role!r}{nearest(role, known) or '.'} Roles of this run: {', '.join(roles)}"
            yield Mistake(f"placement.roles.{role}", problem)
        if pool not in pools:
            problem = f"found {pool!r}, but placement.pools has only {', '.join(pools)}"
            yield Mistake(f"placement.roles.{role}", f"{problem}. Add the pool there, or place the role on another")


def roles_have_workers(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """Every role that the algorithm declares is a built-in one, or has a class."""
    for role in roles:
        if role not in registry.ROLES and role not in config.placement.workers:
            problem = f"is missing: {config.algorithm.name} declares the role {role!r}{nearest(role, registry.ROLES) or '.'}"
            yield Mistake(f"placement.workers.{role}", f"{problem} Name its class as my_package.module:Class")


def ranks_divide(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """Ranks that work as one fit into the ranks of their pool, and those of an engine into a node."""
    sizes = parsed_pools(config)
    unit = "GPUs" if uses_gpus(config) else "ranks"
    pool = pool_of("rollout", config)
    size, tensor = sizes.get(pool), config.rollout.tensor_parallel
    if "rollout" in roles and size is not None and tensor >= 1 and size.ranks_per_node % tensor:
        node = "" if size.nodes == 1 else " on each node"
        problem = f"found {tensor}, which does not divide the {size.ranks_per_node} {unit}{node} of pool {pool!r}"
        yield Mistake("rollout.tensor_parallel", f"{problem}. Use {_divisors(size.ranks_per_node)}.")
    sequence = config.model.sequence_parallel
    for pool in dict.fromkeys(pool_of(role, config) for role in SEQUENCE_PARALLEL_ROLES if role in roles):
        size = sizes.get(pool)
        if size is not None and sequence >= 1 and size.num_ranks % sequence:
            problem = f"found {sequence}, which does not divide the {size.num_ranks} {unit} of pool {pool!r}"
            yield Mistake("model.sequence_parallel", f"{problem}. Use {_divisors(size.num_ranks)}.")


def slots_suffice(config: Config, roles: tuple[str, ...]) -> Iterator[Mistake]:
    """A cluster that is started here has a slot for every rank. One that is joined is asked when the run starts."""
    if config.run.ray_address is not None or os.environ.get("RAY_ADDRESS"):
        return
    sizes = parsed_pools(config)
    for name, size in sizes.items():
        if size.nodes > 1:
            problem = f"found {size}, but a cluster that is started here has one node. Join a larger one with run.ray_address"
            yield Mistake(f"placement.pools.{name}", problem)
    num_gpus, num_slots = gpus_of_this_machine(), cpu_slots_of_this_machine(config.placement.cpu_slots)
    on_gpu = {name: size for name, size in sizes.items() if uses_gpus(config) and not size.is_cpu and size.nodes == 1}
    needed = sum(size.num_ranks for size in on_gpu.values())
    if needed and not num_gpus:
        problem = "found cuda, but the NVIDIA driver shows no GPU on this machine. Set run.device=cpu"
        yield Mistake("run.device", f"{problem}, or CUDA_VISIBLE_DEVICES where there is one after all")
    elif needed > num_gpus:
        problem = f"{_listed(on_gpu)} need {needed} GPUs; this machine has {num_gpus}"
        yield Mistake("placement.pools", f"{problem}. Use fewer ranks, or join a larger cluster with run.ray_address")
    needed = sum(size.num_ranks for size in sizes.values() if size.nodes == 1)
    if needed > num_slots:  # a rank with a GPU takes a CPU slot too
        problem = f"{_listed(sizes)} need {needed} CPU slots; this machine has {num_slots}"
        yield Mistake("placement.pools", f"{problem}. Use fewer ranks, or set placement.cpu_slots={needed} to share cores")


def parsed_pools(config: Config) -> dict[str, PoolSize]:
    """The sizes of the pools that are well formed."""
    sizes = {}
    for name, text in config.placement.pools.items():
        try:
            sizes[name] = parse_pool(text)
        except PlacementError:
            continue  # pools_are_well_formed tells
    return sizes


def pool_of(role: str, config: Config) -> str:
    """The pool that `role` is on: as placed, else the first."""
    return config.placement.roles.get(role, next(iter(config.placement.pools), ""))


def uses_gpus(config: Config) -> bool:
    """Whether ranks get GPUs; where that is left to `auto`, this machine's tell."""
    return config.run.device == "cuda" or (config.run.device == "auto" and gpus_of_this_machine() > 0)


def _divisors(number: int) -> str:
    divisors = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return " or ".join([", ".join(divisors[:-1]), divisors[-1]]) if len(divisors) > 1 else divisors[0]


def _listed(sizes: Mapping[str, PoolSize]) -> str:
    return "pools " + ", ".join(f"{name} ({size})" for name, size in sizes.items())
