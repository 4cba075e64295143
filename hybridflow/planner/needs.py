"""From a run's configuration to what the roles of a pool need, and between what the plan may choose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass

from hybridflow.config.pools import parse_pool
from hybridflow.config.rules_placement import ENGINE_ROLES, pool_of
from hybridflow.config.schema import ENGINE_SHARE, LOGITS_CHUNK_TOKENS, Config, Switch, TrainingConfig
from hybridflow.planner.memory import (
    CHECKPOINTING,
    GIB,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    RESERVED_SHARE,
    SLEEP,
    UNKNOWN_ROLE_SHARE,
    EngineNeeds,
    Gpu,
    PoolNeeds,
    SyncNeeds,
)
from hybridflow.planner.sizes import ModelNeeds, ModelSize, Numerics, TokenLimits

WITHOUT_OUTPUT_LAYER = ("critic", "reward_model", "cost_model")
WITHOUT_GPU = ("data", "reward", "pretraining")
"""Roles that hold nothing on a GPU, wherever they are placed."""
ENGINES_THAT_FREE_WEIGHTS = ("vllm",)
"""Of an engine that is not named here, sleeping frees the cache alone."""
BYTES = {"bfloat16": 2, "float32": 4}
DTYPE_ON_GPU = "bfloat16"
"""What `auto` means for the dtype of layers."""

CHUNKS = (LOGITS_CHUNK_TOKENS, 2048, 1024)
BUSY_PARAMETER_TOKENS = 4e11
"""Tokens x parameters of a layer from which on an update's kernels hide the host: at 4e14 operations a second, half of what an
H200 does, a layer's forward pass takes 2 ms then, some ten times what launching it takes. Of Qwen2.5-0.5B these are 26,800
tokens, where 24,576 were set by hand; of SmolLM2-135M, which stood still at 16,384, more than `MOST_TOKENS`."""
FORWARD_FACTOR = 2.5
"""A pass without gradients has a third of the work for each launch, and keeps nothing: by hand 65,536 tokens."""
LEAST_TOKENS = {"one": (4096, 8192), "several": (8192, 32768)}
"""Of an update and of a pass without gradients, where memory allows it, on one rank and on several. Several gather each layer's
weights in every microbatch, which takes as long as computing 2,000 tokens with them."""
STEP_TOKENS = 2048
"""Sizes are multiples of this, so that a little less free memory at the next start changes nothing."""
MOST_TOKENS = (65536, 131072)
EXPECTED_SHARE = 0.5
"""Of the longest row, what a row is taken to have."""
SECONDS_SAVED_PER_FLOP = 1.0e-15
"""By torch.compile: 0.300 s became 0.239 for 20,400 tokens of Qwen2.5-0.5B on an H200, at six operations for each parameter."""
COMPILING_S = 60.0
ENGINE_EXTRA = 3 * GIB
"""Of an engine beside weights and cache: CUDA graphs, its process's context, workspaces. Assumed."""
ENGINE_BATCH_TOKENS = 8192
"""Tokens of prompts that an engine reads at once, whose activations it counts in its share."""
SAMPLER_BYTES = 12
"""Of an engine, for each logit of the responses that it generates at once: float32, sorted, and as probabilities."""
OWN_POOL_SHARE, GENEROUS_SHARE = 0.85, 0.3
"""Of a GPU that an engine has to itself; of one that it shares where the models do not want the room."""


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


def is_open(config: Config, roles: Set[str]) -> bool:
    """Whether something about these roles is left to the plan."""
    values: list[object] = [value for option, value in switches(config).items() if option.partition(".")[0] in roles]
    values += [section.tokens_per_microbatch for role, section in config.models.items() if role in roles]
    if roles & config.models.keys():
        values += [config.model.logits_chunk_tokens, config.model.compile]
    if not roles.isdisjoint(ENGINE_ROLES):
        values.append(config.rollout.gpu_memory_utilization)
    return "auto" in values


def pool_needs(config: Config, pool: PoolInfo, run_roles: Set[str], *, is_compiled: bool = False) -> PoolNeeds:
    """What the roles of a pool need; `run_roles` are those of all pools, `is_compiled` is what `model.compile: auto` means."""
    engines = [role for role in ENGINE_ROLES if role in pool.roles]
    models = tuple(_model_needs(config, role, pool, is_compiled) for role in pool.roles if role in config.models)
    sync = _sync_needs(config, pool) if {"actor", "rollout"} <= run_roles else None
    unknown = tuple(role for role in pool.roles if role not in pool.sizes and role not in WITHOUT_GPU)
    beside = (sync.buffers(pool.num_ranks) if sync else 0) + len(unknown) * int(UNKNOWN_ROLE_SHARE * pool.gpu.total)
    return PoolNeeds(
        pool=pool.name,
        num_ranks=pool.num_ranks,
        ranks_multiple=math.lcm(
            config.rollout.tensor_parallel if engines else 1, config.model.sequence_parallel if models else 1
        ),
        gpu=pool.gpu,
        models=models,
        engine=_engine_needs(config, pool, engines[0], beside) if engines else None,
        sync=sync,
        unknown_roles=unknown,
        fixed={
            option: value
            for option, value in switches(config).items()
            if value != "auto" and option.partition(".")[0] in pool.roles
        },
        chunks=CHUNKS if config.model.logits_chunk_tokens == "auto" else (),
    )


def compiling_pays(config: Config, pools: Iterable[PoolInfo], num_training_rows: int | None) -> bool:
    """Whether torch.compile saves twice the time that it takes, over all steps of the run, for the roles that learn.

    `num_training_rows` gives the steps where `run.total_steps` does not; where that is not known either, the run is long.
    """
    if config.model.compile != "auto":
        return config.model.compile
    steps = config.run.total_steps
    if steps is None and num_training_rows is None:
        return True
    steps = steps or config.run.total_epochs * (num_training_rows or 0) // config.data.prompts_per_step
    tokens = steps * step_rows(config) * config.max_model_tokens * EXPECTED_SHARE
    trained = config.algorithm.trained_roles
    saved = sum(
        6 * pool.sizes[role].parameters * tokens / pool.num_ranks * SECONDS_SAVED_PER_FLOP
        for pool in pools
        for role in pool.sizes
        if role in trained
    )
    return saved > 2 * COMPILING_S


def step_rows(config: Config) -> int:
    """Rows of a step; of an algorithm that has no such option two for each prompt."""
    options: Mapping[str, object] = vars(config.algorithm.options) if config.algorithm.options is not None else {}
    number = options.get("responses_per_prompt")
    return config.data.prompts_per_step * (number if isinstance(number, int) else 2)


def _model_needs(config: Config, role: str, pool: PoolInfo, is_compiled: bool) -> ModelNeeds:
    longest_row = -(-config.max_model_tokens // config.model.sequence_parallel)  # goes alone where it exceeds the budget
    dtype, section = config.model.compute_dtype, config.models[role]
    chunk = config.model.logits_chunk_tokens
    update = section.update_tokens if isinstance(section, TrainingConfig) else section.forward_tokens
    return ModelNeeds(
        role=role,
        size=pool.sizes[role],
        num_ranks=pool.num_ranks,
        is_trained=role in config.algorithm.trained_roles,
        has_output_layer=role not in WITHOUT_OUTPUT_LAYER,
        tokens=max(update, longest_row),
        forward_tokens=max(section.forward_tokens, longest_row),
        numerics=Numerics(
            compute_bytes=BYTES[DTYPE_ON_GPU if dtype == "auto" else dtype],
            is_compiled=is_compiled if config.model.compile == "auto" else config.model.compile,
            chunk_tokens=LOGITS_CHUNK_TOKENS if chunk == "auto" else chunk,
        ),
        limits=_limits(config, role, pool, longest_row) if section.tokens_per_microbatch == "auto" else None,
    )


def _limits(config: Config, role: str, pool: PoolInfo, longest_row: int) -> TokenLimits:
    """The fewest tokens with which the host is hidden, within fixed bounds and what a step has at most."""
    section = config.models[role]
    of_step = max(longest_row, -(-step_rows(config) * config.max_model_tokens // pool.num_ranks))
    busy = BUSY_PARAMETER_TOKENS / pool.sizes[role].layer_parameters
    least = LEAST_TOKENS["one" if pool.num_ranks == 1 else "several"]
    update, forward = (
        max(longest_row, min(of_step, max(fewest, min(most, int(tokens)))) // STEP_TOKENS * STEP_TOKENS)
        for tokens, fewest, most in zip((busy, busy * FORWARD_FACTOR), least, MOST_TOKENS, strict=True)
    )
    is_given = isinstance(section, TrainingConfig) and section.forward_tokens_per_microbatch != "auto"
    return TokenLimits(longest_row=longest_row, update=update, forward=None if is_given else forward)


def _engine_needs(config: Config, pool: PoolInfo, role: str, beside: int) -> EngineNeeds:
    """`beside` is what weight sync and the user's own roles take of the GPU."""
    rollout = config.rollout
    weights = pool.sizes[role].parameters * _engine_bytes(config) // rollout.tensor_parallel
    frees_weights = rollout.engine in ENGINES_THAT_FREE_WEIGHTS
    wanted = _wanted(config, pool, role) if rollout.gpu_memory_utilization == "auto" else ()
    levels = _engine_levels(config, pool, wanted, beside) if wanted else ()
    given = ENGINE_SHARE if rollout.gpu_memory_utilization == "auto" else rollout.gpu_memory_utilization
    return EngineNeeds(
        role=role,
        num_bytes=levels[0] if levels else int(given * pool.gpu.total),
        kept_asleep=0 if frees_weights else weights,
        levels=levels,
        wanted=wanted,
    )


def _engine_levels(config: Config, pool: PoolInfo, wanted: tuple[int, ...], beside: int) -> tuple[int, ...]:
    """Shares of the GPU in bytes, in hundredths of it: with room to spare, then `wanted`. Of a GPU without models there is one:
    what is free of it, and the least that is wanted where that is more."""
    total = pool.gpu.total
    if not config.models.keys() & set(pool.roles):
        free = pool.gpu.free - int(RESERVED_SHARE * total) - beside
        return (max(wanted[-1], min(int(OWN_POOL_SHARE * total), free)),)
    most = int((1 - RESERVED_SHARE) * total)
    levels = [max(int(GENEROUS_SHARE * total), 2 * wanted[0]), *wanted]
    return tuple(min(most, -(-level * 100 // total) * total // 100) for level in levels)


def _wanted(config: Config, pool: PoolInfo, role: str) -> tuple[int, ...]:
    """Bytes of an engine for all rows of a step at once, each as long as it may be; for half of that; for an eighth."""
    rollout, size = config.rollout, pool.sizes[role]
    number = _engine_bytes(config)
    engines = max(1, pool.num_ranks // rollout.tensor_parallel)
    rows = min(rollout.max_num_seqs, -(-step_rows(config) * (1 + config.loop.max_staleness) // engines))
    row = config.max_model_tokens * 2 * size.key_value * size.num_layers * number
    fixed = size.parameters * number + SAMPLER_BYTES * rollout.max_num_seqs * size.vocabulary
    fixed += ENGINE_BATCH_TOKENS * number * (2 * size.feed_forward + 6 * size.hidden)
    at_once = (rows, max(8, rows // 2), max(8, rows // 8))
    return tuple((fixed + count * row) // rollout.tensor_parallel + ENGINE_EXTRA for count in at_once)


def _sync_needs(config: Config, pool: PoolInfo) -> SyncNeeds | None:
    """What weights travel in on this pool; None where neither side of a sync is on it."""
    sides = [role for role in ("actor", *ENGINE_ROLES) if role in pool.sizes]
    if not sides:
        return None
    size, tensor = pool.sizes[sides[0]], config.rollout.tensor_parallel
    # Embeddings are the largest tensor, and sharded over an engine's ranks; a tensor above the limit has a bucket of its own.
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
