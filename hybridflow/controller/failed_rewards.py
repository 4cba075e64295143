"""Ends a run whose rewards fail: a policy cannot learn from a reward that is the same for most of a step, whatever it says."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from hybridflow.batch import Batch
from hybridflow.errors import RewardError

Collect = Callable[[Batch], Batch]


class FailedRewards:
    """Counts what could not be scored, over as many prompts as a step takes, those that are refused afterwards included.

    Example: `FailedRewards(prompts_per_step=64, max_share=0.5, cause=reward.failure_cause).watching(algorithm.collect)`.
    """

    def __init__(self, *, prompts_per_step: int, max_share: float, cause: Callable[[], str]):
        """`cause` says in words what most of the failures come from."""
        self.prompts_per_step, self.max_share, self.cause = prompts_per_step, max_share, cause
        self._lock = threading.Lock()
        self._prompts = self._rows = self._failed = 0

    def watching(self, collect: Collect) -> Collect:
        """`collect`, raising RewardError where too much of a step has failed, or a reward is not finite."""

        def watched(prompts: Batch) -> Batch:
            rows = collect(prompts)
            _check_finite(rows)
            self.count(len(prompts), rows)
            return rows

        return watched

    def count(self, num_prompts: int, rows: Batch) -> None:
        """Rows of so many prompts have been collected, on any thread.

        Raises:
            RewardError: with them a step's prompts are complete, and too many of their rows have failed.
        """
        if "reward_failed" not in rows:
            return
        with self._lock:
            self._prompts += num_prompts
            self._rows += len(rows)
            self._failed += int(np.count_nonzero(rows["reward_failed"]))
            if self._prompts < self.prompts_per_step:
                return
            num_rows, num_failed = self._rows, self._failed
            self._prompts = self._rows = self._failed = 0
        if num_failed > self.max_share * num_rows:
            raise RewardError(
                f"{num_failed} of {num_rows} responses of a step could not be scored, more than reward.max_failed_share="
                f"{self.max_share:g} allows. {self.cause()}\nCorrect the reward function, or see why the service that it asks "
                "does not answer; with reward.max_failed_share=1 such responses get reward.failure_reward, and the run goes on"
            )


def _check_finite(rows: Batch) -> None:
    """Whoever gave the rewards, a role or an environment of the user's too: as float32, which they are by now.

    Raises:
        RewardError: a reward is not finite.
    """
    if "reward" not in rows:
        return
    with np.errstate(over="ignore"):
        bad = np.flatnonzero(~np.isfinite(rows["reward"].astype(np.float32)))
    if bad.size:
        raise RewardError(
            f"{bad.size} of {len(rows)} rewards are not finite as float32, the first is {rows['reward'][bad[0]]}. Look at what "
            "gives them: the reward function, a reward role or an environment of your own. Rewards are at most 3.4e38"
        )
