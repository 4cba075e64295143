"""What answers are worth: accuracy, pass@k and majority@k over prompts, each with a confidence interval.

P prompts, N responses to each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridflow.metrics import Metrics

Z95 = 1.959964
"""Standard deviations on either side that hold 95 % of a normal distribution."""
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its 95 % confidence interval. What is drawn is prompts: responses to one are not independent."""

    value: float
    low: float
    high: float
    num_prompts: int

    @staticmethod
    def of(per_prompt_P: Numbers) -> Estimate:
        """Wilson's interval where every prompt has 0 or 1, else the normal one.

        Example:
            >>> Estimate.of(np.array([1.0, 1.0, 0.0, 1.0]))
            Estimate(value=0.75, low=0.30064184..., high=0.95441273..., num_prompts=4)
        """
        num, mean = len(per_prompt_P), float(per_prompt_P.mean())
        if np.isin(per_prompt_P, (0.0, 1.0)).all():
            centre = (mean + Z95**2 / (2 * num)) / (1 + Z95**2 / num)
            half = Z95 / (1 + Z95**2 / num) * math.sqrt(mean * (1 - mean) / num + Z95**2 / (4 * num**2))
            return Estimate(mean, centre - half, centre + half, num)
        half = Z95 * float(per_prompt_P.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan
        return Estimate(mean, mean - half, mean + half, num)


def pass_at_k(correct_PN: npt.NDArray[np.bool_], k: int) -> Numbers:
    """For each prompt, how likely one of `k` of its N responses is correct: 1 - C(N - c, k) / C(N, k), without bias.

    Chen et al. 2021, arXiv:2107.03374, eq. 1.

    Example:
        >>> pass_at_k(np.array([[True, False, False, False]]), 2).tolist()
        [0.5]
    """
    num = correct_PN.shape[1]
    return np.array([1 - math.comb(num - int(count), k) / math.comb(num, k) for count in correct_PN.sum(1)])


def majority_at_k(correct_PN: npt.NDArray[np.bool_], answers_PN: npt.NDArray[np.int64], k: int) -> Numbers:
    """For each prompt, the share of its N // k runs of k responses in which the most frequent answer, of several the first, is
    correct.

    Example:
        >>> majority_at_k(np.array([[True, False, True]]), np.array([[7, 5, 7]]), 3).tolist()
        [1.0]
    """
    return np.array([_share_of_runs(*row, k) for row in zip(correct_PN, answers_PN, strict=True)])


def _share_of_runs(correct_N: npt.NDArray[np.bool_], answers_N: npt.NDArray[np.int64], k: int) -> float:
    won = []
    for start in range(0, len(answers_N) - k + 1, k):
        run = answers_N[start : start + k].tolist()
        winner = max(run, key=run.count)  # of those that are equally frequent, the first
        won.append(bool(correct_N[start + run.index(winner)]))
    return float(np.mean(won))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answered prompts: rows of one prompt follow each other, as many for each."""

    rewards: Numbers
    """Shape [P N], as all below."""
    answers: npt.NDArray[np.int64]
    """Equal where the answers are."""
    sources: Sequence[str]
    responses_per_prompt: int
    correct_reward: float
    """A response with at least this reward is correct."""

    def estimates(self, ks: Sequence[int]) -> dict[str, dict[str, Estimate]]:
        """For each data source, and under `all` for all: `reward`, `accuracy`, and pass@k and majority@k of each k above 1."""
        num = self.responses_per_prompt
        rewards_PN = self.rewards.reshape(-1, num)
        sources_P = np.array(self.sources, object)[::num]
        names = list(dict.fromkeys(self.sources))
        chosen = {"all": np.ones(len(rewards_PN), np.bool_)}
        if len(names) > 1:
            chosen |= {name: sources_P == name for name in names}
        return {name: self._of(rewards_PN[rows], self.answers.reshape(-1, num)[rows], ks) for name, rows in chosen.items()}

    def _of(self, rewards_PN: Numbers, answers_PN: npt.NDArray[np.int64], ks: Sequence[int]) -> dict[str, Estimate]:
        correct_PN = rewards_PN >= self.correct_reward - 1e-6
        found = {"reward": Estimate.of(rewards_PN.mean(1)), "accuracy": Estimate.of(correct_PN.mean(1))}
        for k in (k for k in ks if k > 1):
            found[f"pass@{k}"] = Estimate.of(pass_at_k(correct_PN, k))
            found[f"majority@{k}"] = Estimate.of(majority_at_k(correct_PN, answers_PN, k))
        return found


def powers_of_two(num: int) -> list[int]:
    """1, 2, 4 and so on up to `num`, which is among them."""
    return sorted({*(1 << exponent for exponent in range(num.bit_length())), num})


def as_metrics(estimates: dict[str, dict[str, Estimate]]) -> Metrics:
    """`accuracy`, `accuracy/low`, `accuracy/high` and so on; of one of several sources with its name before it."""
    metrics = {}
    for source, found in estimates.items():
        prefix = "" if source == "all" else f"{source.replace('/', '_')}/"
        for name, estimate in found.items():
            if source != "all" or name != "reward":  # the mean reward of all has its name already
                metrics[f"{prefix}{name}"] = estimate.value
                metrics |= {f"{prefix}{name}/low": estimate.low, f"{prefix}{name}/high": estimate.high}
    return Metrics(metrics)
