"""Generation and scoring of the same rows at the same time: finished responses are scored while others still run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hybridflow.batch import Array, Batch
from hybridflow.workers.remote import CombinedFuture, Future

if TYPE_CHECKING:
    from hybridflow.rollout.base import Sampling
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker

NUM_PARTS = 8
"""Most calls in which responses are handed over; what finishes at once comes at once. Where scoring keeps up, an eighth of it
is left when generation ends; with more parts less would be left, but each costs the controller up to two calls, some 3 ms."""

LIGHT_COLUMNS_GENERATED = ("prompt_tokens", "seed", "sample", "position")
LIGHT_COLUMNS_SCORED = ("prompt_tokens", "response_tokens")
"""What the controller sends beside tokens and text: rows are balanced over ranks by numbers of tokens, and the built-in roles
read no other numbers."""


def respond(
    rows: Batch, rollout: RolloutWorker, reward: RewardWorker, *, sampling: Sampling | None = None
) -> tuple[Batch, Future[Batch]]:
    """`rows` with a response to each, once the last is there, and a future of their scores, most of which are there too.

    Row by row this is what `rollout.generate` and then `reward.score` give. That is what is called where a class of the user's
    own generates or scores, since it may look at all rows at once, and where both roles share a pool, since its processes hand
    no responses over while they score: slow scores would add up, part by part.
    """
    if _are_built_in(rollout, reward) and not _share_pool(rollout, reward):
        return respond_in_parts(rows, rollout, reward, sampling=sampling)
    rows = rows.join(rollout.generate(rows, sampling=sampling))
    return rows, reward.score.start(rows)


def respond_in_parts(
    rows: Batch, rollout: RolloutWorker, reward: RewardWorker, *, sampling: Sampling | None = None
) -> tuple[Batch, Future[Batch]]:
    """As `respond`, with scoring that begins when the first rows have finished; for a batch function when all have."""
    scores_rows_alone = reward.scores_rows_alone.start()
    placed = rows.with_columns(position=np.arange(len(rows), dtype=np.int32))
    rollout.submit(_with_light(placed, LIGHT_COLUMNS_GENERATED), sampling=sampling)
    parts: list[Batch] = []
    calls: list[Future[Batch]] = []
    positions: list[Array] = []
    num_parts_scored, num_rows_left = 0, len(rows)
    for num_parts_left in range(NUM_PARTS, 0, -1):
        parts.append(rollout.generate_part(num_parts_left))
        num_rows_left -= len(parts[-1])
        is_idle = _is_idle(calls)
        # One call at a time, for all that has finished. Where scoring is slow its calls grow, and a response that takes
        # until its time limit holds up those behind it once, not once in each part.
        if not num_rows_left or (is_idle and len(parts[-1]) and scores_rows_alone.result()):
            finished = _in_order(parts[num_parts_scored:])
            num_parts_scored = len(parts)
            positions.append(finished["position"])
            answered = rows.select(finished["position"]).join(finished)
            calls.append(reward.score.start(_with_light(answered, LIGHT_COLUMNS_SCORED)))
        if not num_rows_left:
            break

    def in_order(scores: Sequence[Batch]) -> Batch:
        placed = [part.with_columns(position=position) for part, position in zip(scores, positions, strict=True)]
        return _without_position(_in_order(placed))

    return rows.join(_without_position(_in_order(parts))), CombinedFuture(calls, in_order)


def _are_built_in(rollout: RolloutWorker, reward: RewardWorker) -> bool:
    """Whether no class of the user's own has replaced how rows are generated or scored."""
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker

    return type(rollout).generate is RolloutWorker.generate and type(reward).score is RewardWorker.score


def _share_pool(rollout: RolloutWorker, reward: RewardWorker) -> bool:
    assert rollout.dispatcher is not None and reward.dispatcher is not None, "groups respond, not workers"
    return rollout.dispatcher.pool_name == reward.dispatcher.pool_name


def _is_idle(calls: Sequence[Future[Batch]]) -> bool:
    """Whether the last call has ended. Raises its error, so that none is started after one that failed."""
    if calls and not calls[-1].done():
        return False
    if calls:
        calls[-1].result()
    return True


def _in_order(parts: Sequence[Batch]) -> Batch:
    """All rows of the parts, by ascending `position`."""
    whole = Batch.concatenate(parts)
    return whole.select(np.argsort(whole["position"]))


def _without_position(batch: Batch) -> Batch:
    return _with_light(batch, [name for name in batch.light if name != "position"])


def _with_light(batch: Batch, names: Sequence[str]) -> Batch:
    """The batch with those of its light columns alone that are named."""
    return Batch({name: batch.light[name] for name in names if name in batch.light}, batch.sources)
