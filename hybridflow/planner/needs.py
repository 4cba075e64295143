"""From a run's configuration to what the roles of a pool need, and back to a configuration in which all is decided."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import TypeVar

from hybridflow.config.pools import parse_pool
from hybridflow.config.rules_placement import ENGINE_ROLES, pool_of
from hybridflow.config.schema import Config, ReferenceConfig, Switch, TrainingConfig
from hybridflow.planner.memory import (
    CHECKPOINTING,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    SLEEP,
    EngineNeeds,
    Gpu,
    PoolNeeds,
    SyncNeeds,
)
from hybridflow.planner.sizes import ModelNeeds, ModelSize, Numerics

Trained = TypeVar("Trained", bound=TrainingConfig)
WITHOUT_OUTPUT_LAYER = ("critic", "reward_model", "cost_model")
WITHOUT_GPU = ("data", "reward")
"""Roles that hold nothing on a GPU, wherever they are placed."""
ENGINES_THAT_FREE_WEIGHTS = ("vllm",)
"""Of an engine that is not named here, sleeping frees the cache alone."""
BYTES = {"bfloat16": 2, "float32": 4}
DTYPE_ON_GPU = "bfloat16"
"""What `auto` means for the dtype of layers."""


@dataclass(frozen=True, kw_only=True)
class PoolInfo:
    """What is known of a pool once its processes have started."""

    name: str
    roles: tuple[str, ...]
    num_ranks: int
    gpu: Gpu
    sizes: Mapping[str, ModelSize]
    """Of the models of `model_paths`, by role."""


def model_paths(config: Config, roles: Set[str]) -> dict[str, str]:
    """The model that each of `roles` starts from; roles without one are left out."""
    own = {role: section.path for role, section in config.models.items()} | dict.fromkeys(ENGINE_ROLES)
    return {role: path or config.model.path for role, path in own.items() if role in roles}


def switches(config: Config) -> dict[str, Switch]:
    """Every option with what the configuration says about it."""
    trained = {role: section for role, section in config.models.items() if isinstance(section, TrainingConfig)}
    return {
        f"rollout.{SLEEP}": config.rollout.sleep,
        **{f"{role}.{PARAMETERS}": section.offload_parameters for role, section in config.models.items()},
        **{f"{role}.{GRADIENTS}": section.shard_gradients for role, section in trained.items()},
        **{f"{role}.{OPTIMIZER}": section.offload_optimizer for role, section in trained.items()},
        **{f"{role}.{CHECKPOINTING}": config.model.gradient_checkpointing for role in trained},
    }


def has_open_switches(config: Config, roles: Set[str]) -> bool:
    """Whether something about these roles is left to the plan."""
    return any(value == "auto" for option, value in switches(config).items() if option.partition(".")[0] in roles)


def pool_needs(config: Config, pool: PoolInfo, run_roles: Set[str]) -> PoolNeeds:
    """What the roles of a pool need; `run_roles` are those of all pools."""
    engines = [role for role in ENGINE_ROLES if role in pool.roles]
    models = tuple(_model_needs(config, role, pool) for role in pool.roles if role in config.models)
    return PoolNeeds(
        pool=pool.name,
        num_ranks=pool.num_ranks,
        ranks_multiple=math.lcm(
            config.rollout.tensor_parallel if engines else 1, config.model.sequence_parallel if models else 1
        ),
        gpu=pool.gpu,
        models=models,
        engine=_engine_needs(config, pool, engines[0]) if engines else None,
        sync=_sync_needs(config, pool) if {"actor", "rollout"} <= run_roles else None,
        unknown_roles=tuple(role for role in pool.roles if role not in pool.sizes and role not in WITHOUT_GPU),
        fixed={
            option: value
            for option, value in switches(config).items()
            if value != "auto" and option.partition(".")[0] in pool.roles
        },
    )


def resolved(config: Config, options: Set[str] = frozenset(), role: str = "") -> Config:
    """`config` for the worker of `role`, in which no switch is `auto`: those of `options` are on, the others off. A switch that
    the user has set stays; so does a configuration that is resolved already."""

    def decided(option: str, value: Switch) -> bool:
        return option in options if value == "auto" else value

    def trained(name: str, section: Trained) -> Trained:
        return replace(
            section,
            offload_parameters=decided(f"{name}.{PARAMETERS}", section.offload_parameters),
            offload_optimizer=decided(f"{name}.{OPTIMIZER}", section.offload_optimizer),
            shard_gradients=decided(f"{name}.{GRADIENTS}", section.shard_gradients),
        )

    def frozen(name: str, section: ReferenceConfig) -> ReferenceConfig:
        return replace(section, offload_parameters=decided(f"{name}.{PARAMETERS}", section.offload_parameters))

    model, rollout = config.model, config.rollout
    return replace(
        config,
        model=replace(model, gradient_checkpointing=decided(f"{role}.{CHECKPOINTING}", model.gradient_checkpointing)),
        actor=trained("actor", config.actor),
        critic=trained("critic", config.critic),
        reference=frozen("reference", config.reference),
        reward_model=trained("reward_model", config.reward_model),
        cost_model=frozen("cost_model", config.cost_model),
        teacher=frozen("teacher", config.teacher),
        rollout=replace(rollout, sleep=decided(f"rollout.{SLEEP}", rollout.sleep)),
    )


def _model_needs(config: Config, role: str, pool: PoolInfo) -> ModelNeeds:
    longest_row = -(-config.max_model_tokens // config.model.sequence_parallel)  # goes alone where it exceeds the budget
    dtype = config.model.compute_dtype
    return ModelNeeds(
        role=role,
        size=pool.sizes[role],
        num_ranks=pool.num_ranks,
        is_trained=role in config.algorithm.trained_roles,
        has_output_layer=role not in WITHOUT_OUTPUT_LAYER,
        tokens=max(config.models[role].tokens_per_microbatch, longest_row),
        numerics=Numerics(
            compute_bytes=BYTES[DTYPE_ON_GPU if dtype == "auto" else dtype],
            is_compiled=config.model.compile,
            chunk_tokens=config.model.logits_chunk_tokens,
        ),
    )


def _engine_needs(config: Config, pool: PoolInfo, role: str) -> EngineNeeds:
    rollout = config.rollout
    weights = pool.sizes[role].parameters * _engine_bytes(config) // rollout.tensor_parallel
    frees_weights = rollout.engine in ENGINES_THAT_FREE_WEIGHTS
    return EngineNeeds(
        role=role,
        share=int(rollout.gpu_memory_utilization * pool.gpu.total),
        kept_asleep=0 if frees_weights else weights,
    )


def _sync_needs(config: Config, pool: PoolInfo) -> SyncNeeds | None:
    """What weights travel in on this pool; None where neither side of a sync is on it."""
    sides = [role for role in ("actor", *ENGINE_ROLES) if role in pool.sizes]
    if not sides:
        return None
    size, tensor = pool.sizes[sides[0]], config.rollout.tensor_parallel
    # Embeddings are the largest tensor, and cut over an engine's ranks; a tensor above the limit has a bucket of its own.
    largest = -(-size.vocabulary // tensor) * size.hidden * _engine_bytes(config)
    return SyncNeeds(
        bucket=max(config.rollout.sync_bucket_mib * 2**20, largest),
        received=size.parameters * _engine_bytes(config) // tensor,
        engine_ranks=tensor,
        receives=not {"actor"}.issuperset(sides),
        num_senders=None if "actor" in sides else parse_pool(config.placement.pools[pool_of("actor", config)]).num_ranks,
    )


def _engine_bytes(config: Config) -> int:
    return BYTES[config.rollout.dtype_on("cuda")]
