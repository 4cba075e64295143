"""Which memory options a pool of given sizes needs, the cheapest with which everything fits, and the words that say so."""

from __future__ import annotations

from dataclasses import dataclass

from hybridflow.planner.decisions import Decisions
from hybridflow.planner.memory import (
    CHECKPOINTING,
    GIB,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    SLEEP,
    PoolNeeds,
    peak,
)
from hybridflow.planner.sizes import ModelNeeds

COSTS = {
    GRADIENTS: "summed over ranks in every microbatch",
    **{f"{role}.{PARAMETERS}": "copied to the GPU once per step" for role in ("reference", "teacher", "cost_model")},
    OPTIMIZER: "copied to the GPU and back in every update",
    CHECKPOINTING: "recomputes the forward pass of every layer in every update",
    SLEEP: "weights leave the GPU and the cache is rebuilt in every step",
    PARAMETERS: "copied to the GPU and back in every pass and update",
}


@dataclass(frozen=True)
class PoolPlan:
    """What was decided for a pool."""

    needs: PoolNeeds
    options: frozenset[str]
    """Those that are on, the user's own included."""
    is_of_before: bool = False
    """Whether the run decided so at an earlier start, when other memory may have been free."""

    def lines(self) -> list[str]:
        """For the log: what the pool takes at its peak, and each option with its reason.

        Example, PPO of a model of 7B on four GPUs, in part:

            memory of pool 'main' fits: 103.7 of 120.0 GiB at the peak (actor computes); actor.offload_optimizer, ...
              actor: 7.1 GiB of weights and 14.2 GiB of optimizer; microbatches of 8,192 tokens (what memory allows), ...
              rollout: 60.0 GiB of weights and cache (0.50 of the GPU)
              actor.offload_optimizer: copied to the GPU and back in every update; without it 'actor computes' takes ...
        """
        needs, highest = self.needs, peak(self.needs, self.options)
        chosen = [option for option in candidates(needs) if option in self.options]
        own = sorted(needs.switched_on)
        listed = ", ".join([*map(shown, chosen), *(f"{shown(option)} (as configured)" for option in own)])
        sizes = f"{gib(highest.total)} of {gib(needs.gpu.total)} GiB at the peak ({highest.name})"
        lines = [f"memory of pool '{needs.pool}' fits: {sizes}; {listed or 'nothing is offloaded, slept or recomputed'}"]
        for model in needs.models:
            optimizer = f" and {gib(model.optimizer)} GiB of optimizer" if model.is_trained else ""
            lines.append(f"  {model.role}: {gib(model.weights)} GiB of weights{optimizer}; {_microbatches(model)}")
        if needs.engine is not None:
            held, share = gib(needs.engine.num_bytes), needs.engine.num_bytes / needs.gpu.total
            lines.append(f"  {needs.engine.role}: {held} GiB of weights and cache ({share:.2f} of the GPU)")
        if self.is_of_before:
            return [*lines, "  as decided before: the run goes on with the plan of its folder"]
        return lines + [f"  {self._reason(option)}" for option in chosen]

    @property
    def decisions(self) -> Decisions:
        """What the roles of the pool are to be built with, where the user has left it open."""
        needs = self.needs
        open_models = [model for model in needs.models if model.limits is not None]
        engine = needs.engine if needs.engine and needs.engine.levels else None
        return Decisions(
            options=self.options,
            update_tokens={model.role: model.tokens for model in open_models if model.is_trained},
            forward_tokens={model.role: model.passing_tokens for model in open_models},
            chunk_tokens={model.role: model.numerics.chunk_tokens for model in needs.models if needs.chunks},
            engine_share={engine.role: engine.num_bytes / needs.gpu.total} if engine else {},
        )

    def _reason(self, option: str) -> str:
        without = peak(self.needs, self.options - {option})
        cost = COSTS.get(option) or COSTS[option.partition(".")[2]]
        too_much = f"'{without.name}' takes {gib(without.total)} GiB, {gib(self.needs.budget)} can be planned with"
        return f"{shown(option)}: {cost}; without it {too_much}"


def candidates(needs: PoolNeeds) -> list[str]:
    """The options that are left to the plan, cheapest first. Their costs are judged, not measured: docs/memory.md."""
    trained = [model.role for model in needs.models if model.is_trained]
    options = [f"{role}.{GRADIENTS}" for role in trained if needs.num_ranks > 1]
    options += [f"{model.role}.{PARAMETERS}" for model in needs.models if not model.is_trained]
    options += [f"{role}.{OPTIMIZER}" for role in trained] + [f"{role}.{CHECKPOINTING}" for role in trained]
    options += [f"{needs.engine.role}.{SLEEP}"] if needs.engine is not None and trained else []
    options += [f"{role}.{PARAMETERS}" for role in trained]
    return [option for option in options if option not in needs.fixed]


def choose(needs: PoolNeeds) -> PoolPlan | None:
    """The cheapest options with which every phase fits; None where they do not even with all on.

    All are on at first. From the dearest to the cheapest each is switched off again where everything fits without it. No option
    makes a phase larger, so a dearer one stays on only where all cheaper ones together do not suffice.
    """
    options = needs.switched_on | set(candidates(needs))
    if peak(needs, options).total > needs.budget:
        return None
    for option in reversed(candidates(needs)):
        if peak(needs, options - {option}).total <= needs.budget:
            options -= {option}
    return PoolPlan(needs, options)


def _microbatches(model: ModelNeeds) -> str:
    """How many tokens go through a model at once, and why so many."""
    limits = model.limits
    forward = _tokens(model.passing_tokens, limits.forward if limits else None)
    update = f"{_tokens(model.tokens, limits.update if limits else None)}, without gradients " if model.is_trained else ""
    return f"microbatches of {update}{forward}"


def _tokens(tokens: int, most: int | None) -> str:
    if most is None:
        return f"{tokens:,} tokens (as configured)"
    return f"{tokens:,} tokens ({'what memory allows' if tokens < most else 'more gains nothing'})"


def shown(option: str) -> str:
    """An option as the configuration has it: one key recomputes activations, decided for each role."""
    role, _, key = option.partition(".")
    return f"model.{key} of {role}" if key == CHECKPOINTING else option


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.1f}"
