"""The reward role: scores responses by a rule or a user's function, in processes of its own."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import numpy as np

from hybridflow.batch import Array, Batch
from hybridflow.config.schema import Config
from hybridflow.rewards.call import Messages, RewardInput
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Failure, Score
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.remote import remote

logger = logging.getLogger(__name__)

FAILURES_REMEMBERED = 1000


class RewardWorker(Worker):
    """Scores the rows of its rank. Its processes start at construction."""

    is_distributed: ClassVar[bool] = False
    scores_whole_batches: ClassVar[bool] = False
    """Whether `score` compares rows, and is therefore given all rows of a call at once. So it is of a class of your own that
    replaces `score`, unless it says False."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "score" in vars(cls) and "scores_whole_batches" not in vars(cls):
            cls.scores_whole_batches = True

    def __init__(self, config: Config, context: RankContext):
        super().__init__(config, context)
        environment = config.environment
        self.pool = RewardPool(config.reward) if environment.add_reward or not environment.is_set else None
        """None where an environment gives all rewards."""
        self.has_logged = False
        """Whether a failure of this step has been logged."""
        self.failures: deque[Failure] = deque(maxlen=FAILURES_REMEMBERED)

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        """Failures may be logged again."""
        self.has_logged = False

    @remote("rank_zero")
    def scores_rows_alone(self) -> bool:
        """Whether the score of a row depends on that row alone, so that some rows of a step may be scored before others."""
        return self.pool is None or self.pool.function.kind == "sequential"

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        """Columns `reward` and `reward_failed`, and `reward/NAME` for each number that the function returned beside it.

        A response whose function raised, timed out or ended its process gets `reward.failure_reward`, and NaN for the
        numbers; the first such failure of a step is logged.

        Raises:
            RewardError: the function cannot score at all, for example because it does not know the data source.
        """
        if self.pool is None:
            return Batch({"reward": batch["episode_reward"], "reward_failed": batch["episode_failed"]})
        results = self.pool.score(_reward_inputs(batch, last_message=self.config.environment.add_reward is True))
        scores = [result if isinstance(result, Score) else Score(self.config.reward.failure_reward) for result in results]
        failures = [result for result in results if isinstance(result, Failure)]
        self.failures.extend(failures)
        if failures and not self.has_logged:
            self.has_logged = True
            self._log(failures, len(results))
        names = dict.fromkeys(name for score in scores for name in score.metrics)
        columns: dict[str, Array] = {
            "reward": np.array([score.reward for score in scores], np.float32),
            "reward_failed": np.array([isinstance(result, Failure) for result in results], np.bool_),
        }
        for name in names:
            columns[f"reward/{name}"] = np.array([score.metrics.get(name, np.nan) for score in scores], np.float32)
        if "episode_reward" in batch:
            columns["reward"] = np.where(batch["episode_failed"], 0, columns["reward"]) + batch["episode_reward"]
            columns["reward_failed"] |= batch["episode_failed"]
        return Batch(columns)

    @remote("rank_zero")
    def failure_cause(self) -> str:
        """What most of the latest failures come from, with the trace of one."""
        if not self.failures or self.pool is None:
            return "Another rank of the reward role has logged why"
        causes = Counter((failure.reason, failure.cause) for failure in self.failures)
        (reason, cause), count = causes.most_common(1)[0]
        example = next(failure for failure in reversed(self.failures) if (failure.reason, failure.cause) == (reason, cause))
        trace = "" if example.detail.rstrip() == cause else f" The trace of one:\n{example.detail.rstrip()}"
        return f"{count} of the last {len(self.failures)} failures of {self.pool.function.name!r} {reason}: {cause}.{trace}"

    def _log(self, failures: Sequence[Failure], num_rows: int) -> None:
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(f.reason for f in failures).items())
        assert self.pool is not None, "who scores has processes"
        logger.warning(
            "reward %r: %d of %d responses failed (%s) and get reward.failure_reward=%s. The first:\n%s",
            self.pool.function.name,
            len(failures),
            num_rows,
            reasons,
            self.config.reward.failure_reward,
            failures[0].detail.rstrip(),
        )

    @remote("one_to_all")
    def close(self) -> None:
        """End the scoring processes."""
        if self.pool is not None:
            self.pool.close()


def _reward_inputs(batch: Batch, *, last_message: bool) -> list[RewardInput]:
    """Rows of a source that writes no messages or lengths have none."""
    count = len(batch)
    messages = batch.objects("messages") if "messages" in batch else [()] * count
    conversations = batch.objects("conversation") if "conversation" in batch else [None] * count
    tokens = batch["response_tokens"].tolist() if "response_tokens" in batch else [0] * count
    truncated = batch["truncated"].tolist() if "truncated" in batch else [False] * count
    names = ("ground_truth", "data_source", "extra_info", "prompt_text")
    columns = (_responses(batch, last_message=last_message), *(batch.objects(name) for name in names))
    return [
        RewardInput(
            response=cast(str, response),
            ground_truth=ground_truth,
            data_source=cast(str, data_source),
            extra_info=cast(Mapping[str, object], extra_info),
            prompt=cast(str, prompt),
            messages=cast(Messages, asked or ()),
            conversation=cast(Messages, said or (*cast(Messages, asked or ()), {"role": "assistant", "content": response})),
            response_tokens=num_tokens,
            truncated=is_truncated,
        )
        for response, ground_truth, data_source, extra_info, prompt, asked, said, num_tokens, is_truncated in zip(
            *columns, messages, conversations, tokens, truncated, strict=True
        )
    ]


def _responses(batch: Batch, *, last_message: bool) -> list[object]:
    """What is scored: the text of a response, or of an episode the last message of the policy alone."""
    if not last_message or "conversation" not in batch:  # no episodes
        return batch.objects("response_text")
    conversations = cast(list[list[Mapping[str, object]]], batch.objects("conversation"))
    turns = ([message["content"] for message in said if message["role"] == "assistant"] for said in conversations)
    return [contents[-1] if contents else "" for contents in turns]
