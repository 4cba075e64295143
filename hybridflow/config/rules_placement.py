"""Rules about pools, roles, ranks, and what this machine has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hybridflow import registry
from hybridflow.config.pools import PoolSize, cpu_slots_of_this_machine, gpus_of_this_machine, joins_a_cluster, parse_pool
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError, FieldWarning, PlacementError
from hybridflow.registry import nearest

ENGINE_ROLES = ("rollout", "validation")
SEQUENCE_PARALLEL_ROLES = frozenset(Config().models)


def pools_are_well_formed(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """There is a pool, and each size reads as nodes x ranks per node."""
    if not config.placement.pools:
        yield FieldError("placement.pools", "is empty; name at least one pool, for example main: 1x1")
    for name, text in config.placement.pools.items():
        try:
            parse_pool(text)
        except PlacementError as error:
            # What must divide its ranks cannot be judged without a size, so it is told with it.
            divisors = [f"{key}={number}" for key, number in _divisors_of(name, config, roles).items() if number > 1]
            more = f". Its ranks must be a multiple of {' and of '.join(divisors)}" if divisors else ""
            yield FieldError(f"placement.pools.{name}", f"{error}{more}")


def pools_are_used(config: Config, roles: tuple[str, ...]) -> Iterator[FieldWarning]:
    """Every pool has a role; what a pool without one would hold stays idle."""
    used = _used_pools(config, roles)
    for name in (name for name in parsed_pools(config) if name not in used):
        problem = f"no role is on it; place one there by placement.roles.ROLE={name}"
        yield FieldWarning(f"placement.pools.{name}", problem, related=("placement.roles", "algorithm.name"))


def roles_have_pools(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Every role that is placed exists, on a pool that exists."""
    pools = config.placement.pools
    known = {*registry.ROLES, *config.placement.workers, *roles}
    for role, pool in config.placement.roles.items():
        if role not in known:
            problem = f"no role is called {role!r}{nearest(role, known) or '.'} Roles of this run: {', '.join(roles)}"
            yield FieldError(f"placement.roles.{role}", problem, related=("placement.workers", "algorithm.name"))
        if pool not in pools:
            problem = f"found {pool!r}, but placement.pools has only {', '.join(pools)}"
            advice = "Add the pool there, or place the role on another"
            yield FieldError(f"placement.roles.{role}", f"{problem}. {advice}", related=("placement.pools",))


def roles_have_workers(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Every role that the algorithm declares is a built-in one, or has a class."""
    for role in roles:
        if role not in registry.ROLES and role not in config.placement.workers:
            problem = f"is missing: {config.algorithm.name} declares the role {role!r}{nearest(role, registry.ROLES) or '.'}"
            advice = "Name its class as my_package.module:Class"
            yield FieldError(f"placement.workers.{role}", f"{problem} {advice}", related=("algorithm.name",))


def validation_has_engines_of_its_own(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Engines that validate beside training are on a pool that neither trains nor generates for training."""
    if "validation" not in roles or not config.validation.concurrent:
        return
    if not config.data.validation_files:
        yield FieldError("validation.concurrent", "there is nothing to validate on: data.validation_files is empty")
    pool = pool_of("validation", config)
    generating = set(ENGINE_ROLES) - {"validation"}
    if others := [role for role in roles if role in {*config.models, *generating} and pool_of(role, config) == pool]:
        problem = f"role 'validation' is on pool {pool!r}, together with {', '.join(others)}"
        advice = "Name another by placement.roles.validation, or set validation.concurrent=false"
        yield FieldError("validation.concurrent", f"{problem}. {advice}", related=("placement.roles", "placement.pools"))


def ranks_divide(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Ranks that work as one fit into the ranks of their pool, and those of an engine into a node."""
    unit = "GPUs" if uses_gpus(config) else "ranks"
    for pool, size in parsed_pools(config).items():
        for key, number in _divisors_of(pool, config, roles).items():
            is_engine = key == "rollout.tensor_parallel"
            ranks = size.ranks_per_node if is_engine else size.num_ranks
            if ranks % number:
                node = " on each node" if is_engine and size.nodes > 1 else ""
                problem = f"found {number}, which does not divide the {ranks} {unit}{node} of pool {pool!r}"
                about = (f"placement.pools.{pool}", "placement.pools", "placement.roles")
                yield FieldError(key, f"{problem}. Use {divisors(ranks)}.", related=about)


def ranks_fit_this_machine(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """A cluster that is started here has what every rank needs. One that is joined is asked when the run starts."""
    if joins_a_cluster(config):
        return
    used = _used_pools(config, roles)
    sizes = {name: size for name, size in parsed_pools(config).items() if name in used}
    for name, size in sizes.items():
        if size.nodes > 1:
            problem = f"found {size}, but a cluster that is started here has one node. Join a larger one with run.ray_address"
            yield FieldError(f"placement.pools.{name}", problem, related=("run.ray_address",), is_local=True)
    sizes = {name: size for name, size in sizes.items() if size.nodes == 1}
    yield from _enough_gpus({name: size for name, size in sizes.items() if uses_gpus(config) and not size.is_cpu})
    yield from _enough_cpu_slots(sizes, config.placement.cpu_slots)  # a rank with a GPU takes a CPU slot too


def _enough_gpus(sizes: Mapping[str, PoolSize]) -> Iterator[FieldError]:
    needed, num_gpus = sum(size.num_ranks for size in sizes.values()), gpus_of_this_machine()
    if needed and not num_gpus:
        problem = "found cuda, but the NVIDIA driver shows no GPU on this machine. Set run.device=cpu"
        problem = f"{problem}, or CUDA_VISIBLE_DEVICES where there is one after all"
        yield FieldError("run.device", problem, related=("placement.pools", "run.ray_address"), is_local=True)
    elif needed > num_gpus:
        problem = f"{_listed(sizes)} need {needed} GPUs; this machine has {num_gpus}"
        advice = "Use fewer ranks, or join a larger cluster with run.ray_address"
        about = ("run.device", "run.ray_address", "placement.roles")
        yield FieldError("placement.pools", f"{problem}. {advice}", related=about, is_local=True)


def _enough_cpu_slots(sizes: Mapping[str, PoolSize], asked: int | None) -> Iterator[FieldError]:
    needed, num_cpu_slots = sum(size.num_ranks for size in sizes.values()), cpu_slots_of_this_machine(asked)
    if needed <= num_cpu_slots:
        return
    parts = " + ".join(str(size.num_ranks) for size in sizes.values())
    total = f"{parts} = {needed}" if len(sizes) > 1 else str(needed)
    source = "this machine has" if asked is None else "placement.cpu_slots gives"
    problem = f"{_listed(sizes)} need {total} CPU slots, one for each rank; {source} {num_cpu_slots}"
    largest = max(sizes, key=lambda name: sizes[name].num_ranks)
    left = sizes[largest].num_ranks - (needed - num_cpu_slots)
    smaller = f"placement.pools.{largest}={PoolSize(1, left, sizes[largest].is_cpu)}" if left >= 1 else "pools of fewer ranks"
    advice = f"Set {smaller}, or placement.cpu_slots={needed}, with which ranks share cores"
    about = ("placement.cpu_slots", "placement.roles", "run.ray_address")
    yield FieldError("placement.pools", f"{problem}. {advice}", related=about, is_local=asked is None)


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


def _used_pools(config: Config, roles: tuple[str, ...]) -> set[str]:
    """The pools with a role on them."""
    return {pool_of(role, config) for role in ("data", *roles)}


def uses_gpus(config: Config) -> bool:
    """Whether ranks get GPUs; where that is left to `auto`, this machine's tell."""
    return config.run.device == "cuda" or (config.run.device == "auto" and gpus_of_this_machine() > 0)


def divisors(number: int) -> str:
    """All of them, as a list to choose from.

    Example:
        >>> divisors(8), divisors(1)
        ('1, 2, 4 or 8', '1')
    """
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return " or ".join([", ".join(found[:-1]), found[-1]]) if len(found) > 1 else found[0]


def _divisors_of(pool: str, config: Config, roles: tuple[str, ...]) -> dict[str, int]:
    """What must divide the ranks of a pool, by key."""
    here = {role for role in roles if pool_of(role, config) == pool}
    divisors = {"rollout.tensor_parallel": config.rollout.tensor_parallel} if here.intersection(ENGINE_ROLES) else {}
    return divisors | ({"model.sequence_parallel": config.model.sequence_parallel} if here & SEQUENCE_PARALLEL_ROLES else {})


def _listed(sizes: Mapping[str, PoolSize]) -> str:
    return "pools " + ", ".join(f"{name} ({size})" for name, size in sizes.items())
