"""Which memory options a pool needs: the cheapest with which everything fits, and the words that say so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridflow.errors import PlacementError
from hybridflow.planner.memory import (
    CHECKPOINTING,
    GIB,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    SLEEP,
    PoolNeeds,
    peak,
    phases,
)

COSTS = {
    GRADIENTS: "summed over ranks in every microbatch",
    **{f"{role}.{PARAMETERS}": "copied to the GPU once per step" for role in ("reference", "teacher", "cost_model")},
    OPTIMIZER: "copied to the GPU and back in every update",
    CHECKPOINTING: "recomputes the forward pass of every layer in every update",
    SLEEP: "weights leave the GPU and the cache is rebuilt in every step",
    PARAMETERS: "copied to the GPU and back in every pass and update",
}
RANKS_TRIED = sorted(factor << exponent for factor in (2, 3) for exponent in range(10))
"""2, 3, 4, 6, 8, 12, ... up to 1536: numbers that machines and nodes come in."""
FREE_SHARE_EXPECTED = 0.95
"""Of a GPU that nobody else uses, once a process has started on it."""


@dataclass(frozen=True)
class PoolPlan:
    """What was decided for a pool."""

    needs: PoolNeeds
    options: frozenset[str]
    """Those that are on, the user's own included."""

    def lines(self) -> list[str]:
        """For the log: what the pool takes at its peak, and each option with its reason.

        Example, PPO of a model of 7B on four GPUs, in part:

            memory of pool 'main' fits: 103.7 of 120.0 GiB at the peak (actor computes); actor.offload_optimizer, ...
              actor: 7.1 GiB of weights and 14.2 GiB of optimizer
              rollout: 60.0 GiB of weights and cache
              actor.offload_optimizer: copied to the GPU and back in every update; without it 'actor computes' takes ...
        """
        needs, highest = self.needs, peak(self.needs, self.options)
        chosen = [option for option in candidates(needs) if option in self.options]
        own = sorted(needs.switched_on)
        listed = ", ".join([*map(_shown, chosen), *(f"{_shown(option)} (as configured)" for option in own)])
        sizes = f"{_gib(highest.total)} of {_gib(needs.gpu.total)} GiB at the peak ({highest.name})"
        lines = [f"memory of pool '{needs.pool}' fits: {sizes}; {listed or 'nothing is offloaded, slept or recomputed'}"]
        for model in needs.models:
            optimizer = f" and {_gib(model.optimizer)} GiB of optimizer" if model.is_trained else ""
            lines.append(f"  {model.role}: {_gib(model.weights)} GiB of weights{optimizer}")
        if needs.engine is not None:
            lines.append(f"  {needs.engine.role}: {_gib(needs.engine.share)} GiB of weights and cache")
        return lines + [f"  {self._reason(option)}" for option in chosen]

    def _reason(self, option: str) -> str:
        without = peak(self.needs, self.options - {option})
        cost = COSTS.get(option) or COSTS[option.partition(".")[2]]
        too_much = f"'{without.name}' takes {_gib(without.total)} GiB, {_gib(self.needs.budget)} can be planned with"
        return f"{_shown(option)}: {cost}; without it {too_much}"


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


def refusal(needs: PoolNeeds) -> str:
    """Why a pool cannot hold its roles: every phase that does not fit with all options on, and what can be changed."""
    everything = needs.switched_on | set(candidates(needs))
    size = f"{needs.num_ranks} rank(s) with {_gib(needs.gpu.total)} GiB, of which {_gib(needs.budget)} can be planned with"
    tried = ", ".join(map(_shown, sorted(everything))) or "nothing"
    lines = [f"Pool '{needs.pool}' has {size}. With {tried} on, it still needs more:"]
    for phase in phases(needs, everything):
        if phase.total > needs.budget:
            lines.append(f"  {phase.name}: {_gib(phase.total)} GiB")
            largest_first = sorted(phase.usage.items(), key=lambda use: -use[1])
            lines += [f"    {_gib(taken):>7} GiB  {use}" for use, taken in largest_first]
    if needs.gpu.free < FREE_SHARE_EXPECTED * needs.gpu.total:
        lines.append(f"  Other processes hold {_gib(needs.gpu.total - needs.gpu.free)} GiB of the GPU.")
    return "\n".join([*lines, f"  {_advice(needs)}"])


def _advice(needs: PoolNeeds) -> str:
    advice = ["lower tokens_per_microbatch or model.logits_chunk_tokens, set model.lora_rank"]
    if needs.engine is not None:
        advice.insert(0, "lower rollout.gpu_memory_utilization, place rollout on a pool of its own")
    if off := [option for option, is_on in needs.fixed.items() if not is_on]:
        advice.insert(0, f"leave to the plan (auto) what is switched off: {', '.join(map(_shown, off))}")
    if ranks := _ranks_that_suffice(needs):
        advice.insert(0, f"use more ranks: {ranks} of this size suffice (placement.pools.{needs.pool})")
    return f"What helps: {'; '.join(advice)}. To try nevertheless, set every switch to true or false: nothing is planned then."


def _ranks_that_suffice(needs: PoolNeeds) -> int | None:
    """The fewest ranks for which there is a plan."""
    for num_ranks in RANKS_TRIED:
        if num_ranks > needs.num_ranks and num_ranks % needs.ranks_multiple == 0:
            models = tuple(replace(model, num_ranks=num_ranks) for model in needs.models)
            if choose(replace(needs, num_ranks=num_ranks, models=models)):
                return num_ranks
    return None


def choose_all(pools: list[PoolNeeds]) -> list[PoolPlan]:
    """A plan for every pool.

    Raises:
        PlacementError: with every pool that cannot hold its roles, and what of them takes how much.
    """
    plans = [(needs, choose(needs)) for needs in pools]
    if refused := [refusal(needs) for needs, plan in plans if plan is None]:
        raise PlacementError("the GPUs cannot hold what is placed on them. Nothing was loaded.\n" + "\n".join(refused))
    return [plan for _, plan in plans if plan is not None]


def _shown(option: str) -> str:
    """As the configuration has it: one key recomputes activations, decided for each role."""
    role, _, key = option.partition(".")
    return f"model.{key} of {role}" if key == CHECKPOINTING else option


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"
