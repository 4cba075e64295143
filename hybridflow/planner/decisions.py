"""What a plan has decided, as what workers are built from: a configuration in which nothing is left to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from hybridflow.config.rules_placement import ENGINE_ROLES
from hybridflow.config.schema import ENGINE_SHARE, LOGITS_CHUNK_TOKENS, Config, ReferenceConfig, Switch, TrainingConfig
from hybridflow.planner.memory import CHECKPOINTING, GRADIENTS, OPTIMIZER, PARAMETERS, SLEEP

Trained = TypeVar("Trained", bound=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """For whatever is `auto`; what is left out here is as where nothing is planned."""

    options: frozenset[str] = frozenset()
    """Memory options that are on."""
    update_tokens: Mapping[str, int] = field(default_factory=dict)
    """Role -> tokens of a microbatch of an update."""
    forward_tokens: Mapping[str, int] = field(default_factory=dict)
    """Role -> tokens of a microbatch without gradients."""
    chunk_tokens: Mapping[str, int] = field(default_factory=dict)
    """Role -> tokens whose logits exist at once."""
    engine_share: Mapping[str, float] = field(default_factory=dict)
    """Role that generates -> share of the GPU for its engine."""
    is_compiled: bool = False

    def __or__(self, other: Decisions) -> Decisions:
        """Those of two pools."""
        return Decisions(
            options=self.options | other.options,
            update_tokens={**self.update_tokens, **other.update_tokens},
            forward_tokens={**self.forward_tokens, **other.forward_tokens},
            chunk_tokens={**self.chunk_tokens, **other.chunk_tokens},
            engine_share={**self.engine_share, **other.engine_share},
            is_compiled=self.is_compiled or other.is_compiled,
        )


NOTHING_DECIDED = Decisions()


def resolved(config: Config, decisions: Decisions = NOTHING_DECIDED, role: str = "") -> Config:
    """`config` for the worker of `role`, in which nothing is `auto` that a plan decides. What the user has set stays; so does a
    configuration that is resolved already."""

    def decided(option: str, value: Switch) -> bool:
        return option in decisions.options if value == "auto" else value

    def trained(name: str, section: Trained) -> Trained:
        update = decisions.update_tokens.get(name, section.update_tokens)
        forward = decisions.forward_tokens.get(name, section.forward_tokens)
        return replace(
            section,
            tokens_per_microbatch=update,
            forward_tokens_per_microbatch=forward,
            offload_parameters=decided(f"{name}.{PARAMETERS}", section.offload_parameters),
            offload_optimizer=decided(f"{name}.{OPTIMIZER}", section.offload_optimizer),
            shard_gradients=decided(f"{name}.{GRADIENTS}", section.shard_gradients),
        )

    def frozen(name: str, section: ReferenceConfig) -> ReferenceConfig:
        return replace(
            section,
            tokens_per_microbatch=decisions.forward_tokens.get(name, section.forward_tokens),
            offload_parameters=decided(f"{name}.{PARAMETERS}", section.offload_parameters),
        )

    model, rollout = config.model, config.rollout
    chunk, share = model.logits_chunk_tokens, rollout.gpu_memory_utilization
    engine = role if role in ENGINE_ROLES else "rollout"
    return replace(
        config,
        model=replace(
            model,
            gradient_checkpointing=decided(f"{role}.{CHECKPOINTING}", model.gradient_checkpointing),
            compile=decisions.is_compiled if model.compile == "auto" else model.compile,
            logits_chunk_tokens=decisions.chunk_tokens.get(role, LOGITS_CHUNK_TOKENS) if chunk == "auto" else chunk,
        ),
        actor=trained("actor", config.actor),
        critic=trained("critic", config.critic),
        reference=frozen("reference", config.reference),
        reward_model=trained("reward_model", config.reward_model),
        cost_model=frozen("cost_model", config.cost_model),
        teacher=frozen("teacher", config.teacher),
        rollout=replace(
            rollout,
            sleep=decided(f"rollout.{SLEEP}", rollout.sleep),
            gpu_memory_utilization=decisions.engine_share.get(engine, ENGINE_SHARE) if share == "auto" else share,
        ),
    )
