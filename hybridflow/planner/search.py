"""How large microbatches, chunks of logits and the engine's share are, where that is left to the plan.

What goes through a model at once decides how well a GPU is used: with few tokens it waits for the host, which launches every
kernel. Memory options cost time as well, so both are chosen together: options for modest microbatches first, then microbatches
as large as these options allow.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from hybridflow.planner.decisions import Decisions
from hybridflow.planner.memory import PoolNeeds, computing, learning, peak, phases
from hybridflow.planner.needs import STEP_TOKENS
from hybridflow.planner.options import PoolPlan, candidates, choose
from hybridflow.planner.sizes import ModelNeeds

MODEST_TOKENS = (8192, 4096, 0)
"""Microbatches for which options are switched on rather than that tokens become fewer, the best first; 0 is the longest row."""
WAITING_LEVEL = 2
"""Place in `EngineNeeds.levels` from which on not all rows of a step have room at once."""
GROWTH_SHARE = 0.9
"""Of what can be planned with, up to which microbatches grow: the allocator's gaps grow with them."""


@dataclass(frozen=True, order=True)
class Rank:
    """How good a plan is, the smallest first."""

    modesty: int
    """Place in `MODEST_TOKENS`."""
    is_starving: bool
    """Whether the engine has the least that it works with, where it generates rows one after the other."""
    options: int
    """A dearer memory option counts more than all cheaper ones."""
    halvings: int
    """How far microbatches stay behind what would be fastest, summed over roles."""
    waiting: int
    """Whether the engine has room for half of the rows, where all are as long as they may be; they seldom are."""
    chunk: int
    level: int
    """Places in the lists of chunks and of the engine's shares, which begin with the largest."""


def plan(needs: PoolNeeds) -> PoolPlan | None:
    """The best of all plans; None where none fits."""
    found: list[tuple[Rank, PoolPlan]] = []
    for modesty, chunk, level, modest in variants(needs):
        if (chosen := choose(modest)) is not None:
            grown = PoolPlan(_grown(modest, chosen.options), chosen.options)
            is_waiting, is_starving = level >= WAITING_LEVEL, level > WAITING_LEVEL
            rank = Rank(modesty, is_starving, _cost(chosen), _halvings(grown.needs), is_waiting, chunk, level)
            found.append((rank, grown))
    return min(found, key=lambda one: one[0])[1] if found else None


def fingerprint(needs: PoolNeeds) -> str:
    """The same for needs that differ only in how much memory is free."""
    engine = needs.engine
    if engine is not None and engine.levels:
        engine = replace(engine, num_bytes=0, levels=())  # `wanted` stays
    return hashlib.sha256(repr(replace(needs, engine=engine, gpu=replace(needs.gpu, free=0))).encode()).hexdigest()[:16]


def planned_before(needs: PoolNeeds, made: Decisions | None) -> PoolPlan | None:
    """The plan of an earlier start for needs of the same `fingerprint`; None where there is none, or too little is free."""
    if made is None:
        return None
    models = tuple(
        replace(
            _chunked(model, made.chunk_tokens.get(model.role)),
            tokens=made.update_tokens.get(model.role, model.tokens),
            forward_tokens=made.forward_tokens.get(model.role, model.forward_tokens),
        )
        for model in needs.models
    )
    engine = needs.engine
    if engine is not None and engine.levels:
        if engine.role not in made.engine_share:
            return None
        engine = replace(engine, num_bytes=round(made.engine_share[engine.role] * needs.gpu.total))
    before = replace(needs, models=models, engine=engine)
    return PoolPlan(before, made.options, is_of_before=True) if peak(before, made.options).total <= needs.budget else None


def smallest(needs: PoolNeeds) -> PoolNeeds:
    """`needs` with the least of whatever is left to the plan."""
    *_, (_, _, _, least) = variants(needs)
    return least


def variants(needs: PoolNeeds) -> Iterator[tuple[int, int, int, PoolNeeds]]:
    """Every combination of sizes from which microbatches may grow, with the places of the sizes in their lists."""
    is_open = any(model.limits for model in needs.models)
    engine = needs.engine
    for modesty, tokens in enumerate(MODEST_TOKENS if is_open else MODEST_TOKENS[:1]):
        for chunk, chunk_tokens in enumerate(needs.chunks or (None,)):
            models = tuple(_chunked(_modest(model, tokens), chunk_tokens) for model in needs.models)
            for level, num_bytes in enumerate((engine.levels if engine else ()) or (None,)):
                sized = replace(engine, num_bytes=num_bytes) if engine and num_bytes is not None else engine
                yield modesty, chunk, level, replace(needs, models=models, engine=sized)


def _modest(model: ModelNeeds, tokens: int) -> ModelNeeds:
    limits = model.limits
    if limits is None:
        return model
    update = max(limits.longest_row, min(tokens, limits.update))
    forward = model.forward_tokens if limits.forward is None else max(limits.longest_row, min(tokens, limits.forward))
    return replace(model, tokens=update, forward_tokens=forward)


def _chunked(model: ModelNeeds, chunk_tokens: int | None) -> ModelNeeds:
    return model if chunk_tokens is None else replace(model, numerics=replace(model.numerics, chunk_tokens=chunk_tokens))


def _grown(needs: PoolNeeds, options: frozenset[str]) -> PoolNeeds:
    """Microbatches as large as gains something and memory allows. No phase has those of two models, so each grows by itself."""
    room = int(GROWTH_SHARE * needs.budget)

    def largest(with_tokens: Callable[[int], ModelNeeds], modest: int, most: int, phase_name: str) -> int:
        def taken(tokens: int) -> int:
            model = with_tokens(tokens)
            models = tuple(model if other.role == model.role else other for other in needs.models)
            return next(phase.total for phase in phases(replace(needs, models=models), options) if phase.name == phase_name)

        sizes = [modest, *(size for size in range(STEP_TOKENS, most + 1, STEP_TOKENS) if size > modest)]
        return sizes[max(0, bisect_right(sizes, room, key=taken) - 1)]

    grown = []
    for model in needs.models:
        update, forward = model.tokens, model.passing_tokens
        if model.limits is not None and model.is_trained:
            with_update = partial(_with_update, model)
            update = largest(with_update, update, model.limits.update, learning(model.role))
        if model.limits is not None and model.limits.forward is not None:
            with_forward = partial(_with_forward, model)
            forward = largest(with_forward, forward, model.limits.forward, computing(model.role))
        grown.append(replace(model, tokens=update, forward_tokens=forward))
    return replace(needs, models=tuple(grown))


def _with_update(model: ModelNeeds, tokens: int) -> ModelNeeds:
    return replace(model, tokens=tokens)


def _with_forward(model: ModelNeeds, tokens: int) -> ModelNeeds:
    return replace(model, forward_tokens=tokens)


def _cost(chosen: PoolPlan) -> int:
    return sum(1 << digit for digit, option in enumerate(candidates(chosen.needs)) if option in chosen.options)


def _halvings(needs: PoolNeeds) -> int:
    """How often tokens of updates were halved, and those of other passes, in fourths for these, since they cost less time."""
    behind = 0.0
    for model in needs.models:
        if (limits := model.limits) is not None:
            behind += math.log2(limits.update / model.tokens) if model.is_trained else 0.0
            behind += 0.25 * math.log2(limits.forward / model.passing_tokens) if limits.forward is not None else 0.0
    return round(behind)
