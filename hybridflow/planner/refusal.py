"""A plan for every pool, or the words on why there is none and what helps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hybridflow.errors import PlacementError
from hybridflow.planner.decisions import Decisions
from hybridflow.planner.memory import PoolNeeds, phases
from hybridflow.planner.options import PoolPlan, candidates, choose, gib, shown
from hybridflow.planner.search import fingerprint, plan, planned_before, smallest

RANKS_TRIED = sorted(factor << exponent for factor in (2, 3) for exponent in range(10))
"""2, 3, 4, 6, 8, 12, ... up to 1536: numbers that machines and nodes come in."""
FREE_SHARE_EXPECTED = 0.95
"""Of a GPU that nobody else uses, once a process has started on it."""


def plan_all(pools: list[PoolNeeds], noted: Mapping[str, Decisions] | None = None) -> list[PoolPlan]:
    """A plan for every pool: that of `noted`, where it has been made for the same needs and still fits.

    Raises:
        PlacementError: with every pool that cannot hold its roles, and what of them takes how much.
    """
    known = noted or {}
    plans = [(needs, planned_before(needs, known.get(fingerprint(needs))) or plan(needs)) for needs in pools]
    if refused := [refusal(needs) for needs, found in plans if found is None]:
        raise PlacementError("the GPUs cannot hold what is placed on them. Nothing was loaded.\n" + "\n".join(refused))
    return [found for _, found in plans if found is not None]


def refusal(needs: PoolNeeds) -> str:
    """Why a pool cannot hold its roles: every phase that does not fit with all options on, and what can be changed."""
    needs = smallest(needs)
    everything = needs.switched_on | set(candidates(needs))
    size = f"{needs.num_ranks} rank(s) with {gib(needs.gpu.total)} GiB, of which {gib(needs.budget)} can be planned with"
    tried = ", ".join(map(shown, sorted(everything))) or "nothing"
    lines = [f"Pool '{needs.pool}' has {size}. With {tried} on, it still needs more:"]
    for phase in phases(needs, everything):
        if phase.total > needs.budget:
            lines.append(f"  {phase.name}: {gib(phase.total)} GiB")
            largest_first = sorted(phase.usage.items(), key=lambda use: -use[1])
            lines += [f"    {gib(taken):>7} GiB  {use}" for use, taken in largest_first]
    if needs.gpu.free < FREE_SHARE_EXPECTED * needs.gpu.total:
        lines.append(f"  Other processes hold {gib(needs.gpu.total - needs.gpu.free)} GiB of the GPU.")
    return "\n".join([*lines, f"  {_advice(needs)}"])


def _advice(needs: PoolNeeds) -> str:
    advice = ["lower tokens_per_microbatch or model.logits_chunk_tokens, set model.lora_rank"]
    if needs.engine is not None:
        advice.insert(0, "lower rollout.gpu_memory_utilization, place rollout on a pool of its own")
    if off := [option for option, is_on in needs.fixed.items() if not is_on]:
        advice.insert(0, f"leave to the plan (auto) what is switched off: {', '.join(map(shown, off))}")
    if ranks := _ranks_that_suffice(needs):
        advice.insert(0, f"use more ranks: {ranks} of this size suffice (placement.pools.{needs.pool})")
    return f"What helps: {'; '.join(advice)}. To try nevertheless, give all that is auto a value: nothing is planned then."


def _ranks_that_suffice(needs: PoolNeeds) -> int | None:
    """The fewest ranks for which there is a plan."""
    for num_ranks in RANKS_TRIED:
        if num_ranks > needs.num_ranks and num_ranks % needs.ranks_multiple == 0:
            models = tuple(replace(model, num_ranks=num_ranks) for model in needs.models)
            if choose(replace(needs, num_ranks=num_ranks, models=models)):
                return num_ranks
    return None
