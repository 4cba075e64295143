"""Generation and scoring of the same rows at the same time: finished responses are scored while others still run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybridflow.batch import Array, Batch
from hybridflow.errors import RequestRefusedError
from hybridflow.rollout.base import Sampling
from hybridflow.workers.remote import Future
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.reward_model import RewardModelWorker
from hybridflow.workers.rollout import RolloutWorker

NUM_PARTS = 8
"""Calls in which responses are handed over, about; what finishes at once comes at once. Where scoring keeps up, an eighth of it
is left when generation ends; with more parts less would be left, but each costs the controller up to two calls, some 3 ms."""

COLUMNS_GENERATED = ("prompt_tokens", "seed", "sample", "call", "position", "max_response_tokens")
COLUMNS_SCORED = ("prompt_tokens", "response_tokens", "truncated", "episode_reward", "episode_failed")
"""Numbers per row that the controller sends beside tokens and text: rows are balanced over ranks by numbers of tokens, and the
built-in roles read no others."""


def respond(rows: Batch, rollout: RolloutWorker, reward: RewardWorker, *, sampling: Sampling | None = None) -> Batch:
    """`rows` with a response to each and its score: row by row what `rollout.generate` and then `reward.score` give.

    Scoring begins when the first rows have finished. It does not where roles say that they work on whole batches, nor where
    both share a pool, since its processes hand no responses over while they score: slow scores would add up, part by part.
    """
    assert rollout.dispatcher is not None and reward.dispatcher is not None, "groups respond, not workers"
    is_apart = rollout.dispatcher.pool_name != reward.dispatcher.pool_name
    works_by_rows = rollout.answers_row_by_row and not reward.scores_whole_batches
    if works_by_rows and is_apart and not rollout.dispatcher.is_streaming:
        return respond_in_parts(rows, rollout, reward, sampling)
    rows = rows.join(rollout.generate(rows, sampling=sampling))
    return rows.join(reward.score(rows))


def with_model_score(rows: Batch, reward_model: RewardModelWorker | None, *, weight: float) -> Batch:
    """Scored rows with `weight` times the reward model's score added to their reward, and both parts as metrics of the row:
    `reward/rules` and `reward/model`. Without a reward model the rows as they are."""
    if reward_model is None:
        return rows
    rules, model = rows["reward"], reward_model.score(rows)["reward_model_score"]
    parts = {"reward/rules": rules, "reward/model": model, "reward": (rules + weight * model).astype(np.float32)}
    return rows.with_columns(**parts)


def respond_in_parts(rows: Batch, rollout: RolloutWorker, reward: RewardWorker, sampling: Sampling | None) -> Batch:
    """As `respond`, whatever the pools; for a batch function scoring begins when all rows have finished."""
    scores_rows_alone = reward.scores_rows_alone.start()
    placed = rows.with_columns(position=np.arange(len(rows), dtype=np.int64))
    rollout.submit(with_numbers(placed, COLUMNS_GENERATED), sampling=sampling)
    assert rollout.dispatcher is not None
    at_least = -(-len(rows) // (NUM_PARTS * rollout.dispatcher.num_data_ranks))
    parts: list[Batch] = []
    calls: list[Future[Batch]] = []
    positions: list[Array] = []
    num_parts_scored, num_rows_left = 0, len(rows)
    while num_rows_left:
        parts.append(_answered(rollout.take_finished(at_least)))
        num_rows_left -= len(parts[-1])
        is_idle = _is_idle(calls)
        # One call at a time, for all that has finished. Where scoring is slow its calls grow, and a response that takes
        # until its time limit holds up those behind it once, not once in each part.
        if not num_rows_left or (is_idle and len(parts[-1]) and scores_rows_alone.result()):
            finished = _in_order(parts[num_parts_scored:])
            num_parts_scored = len(parts)
            positions.append(finished["position"])
            answered = rows.select(finished["position"]).join(finished)
            calls.append(reward.score.start(with_numbers(answered, COLUMNS_SCORED)))
    rows = rows.join(without_position(_in_order(parts)))
    scores = [call.result().with_columns(position=position) for call, position in zip(calls, positions, strict=True)]
    return rows.join(without_position(_in_order(scores)))


def refusal(finished: Batch) -> tuple[int, str] | None:
    """The first row that the engine does not generate, of what `take_finished` gave, and why."""
    refused = np.flatnonzero(finished["refused"]) if "refused" in finished else np.empty(0, np.int64)
    return (int(refused[0]), str(finished.select(refused[:1]).objects("response_text")[0])) if len(refused) else None


def _answered(finished: Batch) -> Batch:
    """Without the column `refused`; raises where one was."""
    if (found := refusal(finished)) is not None:
        raise RequestRefusedError(found[1])
    return finished.without(("refused",)) if "refused" in finished else finished


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


def without_position(batch: Batch) -> Batch:
    """The batch without the column `position`."""
    return with_numbers(batch, [name for name in batch.per_row if name != "position"])


def with_numbers(batch: Batch, names: Sequence[str]) -> Batch:
    """The batch with those of its numbers per row alone that are named."""
    return Batch({name: batch.per_row[name] for name in names if name in batch.per_row}, batch.sources)
