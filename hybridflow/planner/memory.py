"""What the roles of a pool take of each of its GPUs, phase by phase, under given options.

A *option* is a key of the configuration that is on, such as `actor.offload_optimizer`. `model.gradient_checkpointing`, one key
for all models, is decided for each of them: `actor.gradient_checkpointing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from hybridflow.planner.sizes import MASTER_BYTES, ModelNeeds

GIB = 2**30
RESERVED_SHARE = 0.08
"""Of the GPU, for what is not counted: NCCL, workspaces, and gaps that torch's allocator cannot use. Chosen, not measured; the
recorded runs reserve 12 to 28 GiB beyond what they allocate where there is room, and give it back where there is none."""
UNKNOWN_ROLE_SHARE = 0.05
"""Of the GPU, for each role of the user's own, whose needs nobody stated."""
ASLEEP_BYTES = 2 * GIB
"""What an engine keeps while it sleeps beside what it says: CUDA graphs and workspaces. Assumed, not measured."""

PARAMETERS, OPTIMIZER, CHECKPOINTING, SLEEP = "offload_parameters", "offload_optimizer", "gradient_checkpointing", "sleep"
GRADIENTS = "shard_gradients"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The smallest GPU of a pool, in bytes."""

    total: int
    free: int
    """When its processes have started and nothing is loaded."""


@dataclass(frozen=True, kw_only=True)
class EngineNeeds:
    """The engine of a pool that generates."""

    role: str
    num_bytes: int
    """Weights and cache while awake."""
    kept_asleep: int
    """Of these, what sleeping does not free."""
    levels: tuple[int, ...] = ()
    """What `num_bytes` may be where that is left to the plan, the largest first, last the least that an engine works with."""
    wanted: tuple[int, ...] = ()
    """What `levels` come from, whatever memory is free."""


@dataclass(frozen=True, kw_only=True)
class SyncNeeds:
    """Buffers that weights travel in, on a pool that sends or receives them; they stay between syncs: docs/resharding.md."""

    bucket: int
    """The largest bucket, as one rank receives it."""
    received: int
    """Everything that one rank receives."""
    engine_ranks: int
    """Ranks of one engine, each of which receives something else."""
    receives: bool
    """Whether the engine is on this pool."""
    num_senders: int | None = None
    """Ranks of the actor's pool; None where it is this one."""

    def buffers(self, num_ranks: int) -> int:
        """On each of `num_ranks` ranks: two for what arrives and, where it comes from several, one in which tensors are put
        together; two for what leaves to ranks that read something else, of which each sender has its share."""
        num_shards = self.num_senders or num_ranks
        one, two = min(self.bucket, self.received), min(2 * self.bucket, self.received)
        arriving = two + (one if num_shards > 1 else 0) if self.receives else 0
        leaves = self.num_senders is None and (self.engine_ranks > 1 or not self.receives)
        return arriving + (two * self.engine_ranks // num_shards if leaves else 0)


@dataclass(frozen=True, kw_only=True)
class PoolNeeds:
    """Everything that the roles of a pool need of one of its GPUs."""

    pool: str
    num_ranks: int
    ranks_multiple: int = 1
    """Of which the number of ranks is a multiple: those of an engine, and those that share a row in training."""
    gpu: Gpu
    models: tuple[ModelNeeds, ...]
    engine: EngineNeeds | None = None
    sync: SyncNeeds | None = None
    unknown_roles: tuple[str, ...] = ()
    fixed: Mapping[str, bool] = field(default_factory=dict)
    """Measures that the user has decided."""
    chunks: tuple[int, ...] = ()
    """Tokens whose logits may exist at once where that is left to the plan, the most first."""

    @property
    def switched_on(self) -> frozenset[str]:
        """What the user has decided to do."""
        return frozenset(option for option, is_on in self.fixed.items() if is_on)

    @property
    def budget(self) -> int:
        """What can be planned with: free memory less a reserve."""
        return self.gpu.free - int(self.gpu.total * RESERVED_SHARE)

    @property
    def sync_buffers(self) -> int:
        return self.sync.buffers(self.num_ranks) if self.sync is not None else 0


@dataclass(frozen=True)
class Phase:
    """A time of the step in which memory is at a peak, and what it consists of."""

    name: str
    usage: Mapping[str, int]
    """Words -> bytes; what takes nothing is left out."""

    @property
    def total(self) -> int:
        return sum(self.usage.values())


def phases(needs: PoolNeeds, options: Set[str]) -> Iterator[Phase]:
    """The peaks of a step: generation, the merging of adapters, each role's pass without gradients, each role's update.

    Engines are awake from generation to the end of collection, where models compute without gradients, and may sleep while
    roles learn. An offloaded role is back on the GPU while it computes; its optimizer only while it learns.
    """
    if needs.engine is not None:
        yield _phase(needs, options, "generation", {})
    for model in needs.models:
        if needs.sync_buffers and model.has_adapters and model.has_output_layer:
            merging = {f"{model.role}: merged weights": model.parameters * MASTER_BYTES // model.num_ranks}
            yield _phase(needs, options, "weight sync", merging, active=model)
        forward = {f"{model.role}: layers and logits": model.forward()}
        yield _phase(needs, options, computing(model.role), forward, active=model)
    for model in needs.models:
        if model.is_trained:
            is_checkpointed = f"{model.role}.{CHECKPOINTING}" in options
            backward = {
                f"{model.role}: gradients": model.gradients(are_sharded=f"{model.role}.{GRADIENTS}" in options),
                f"{model.role}: layers, activations and logits": model.backward(is_checkpointed=is_checkpointed),
            }
            yield _phase(needs, options, learning(model.role), backward, active=model, learns=True)


def computing(role: str) -> str:
    """The name of the phase in which a role's model passes rows without gradients."""
    return f"{role} computes"


def learning(role: str) -> str:
    """The name of the phase in which a role's model is updated."""
    return f"{role} learns"


def _phase(
    needs: PoolNeeds,
    options: Set[str],
    name: str,
    working: Mapping[str, int],
    *,
    active: ModelNeeds | None = None,
    learns: bool = False,
) -> Phase:
    usage: dict[str, int] = {}
    if needs.engine is not None:
        engine = needs.engine
        is_asleep = learns and f"{engine.role}.{SLEEP}" in options
        usage[f"{engine.role}: {'asleep' if is_asleep else 'weights and cache'}"] = (
            min(engine.num_bytes, engine.kept_asleep + ASLEEP_BYTES) if is_asleep else engine.num_bytes
        )
    usage["weight sync: buckets"] = needs.sync_buffers
    for model in needs.models:
        is_active = model is active
        is_here = is_active or f"{model.role}.{PARAMETERS}" not in options
        usage[f"{model.role}: weights"] = model.weights if is_here else 0
        has_optimizer = (is_active and learns) or f"{model.role}.{OPTIMIZER}" not in options
        usage[f"{model.role}: optimizer"] = model.optimizer if has_optimizer else 0
    for role in needs.unknown_roles:
        usage[f"{role}: reserved, since its needs are not known"] = int(needs.gpu.total * UNKNOWN_ROLE_SHARE)
    return Phase(name, {use: size for use, size in {**usage, **working}.items() if size})


def peak(needs: PoolNeeds, options: Set[str]) -> Phase:
    """The phase that takes most; of a pool without models and engine, one that takes what is reserved for unknown roles."""
    return max(phases(needs, options), key=lambda phase: phase.total, default=_phase(needs, options, "all", {}))
