"""Scoring while others generate changes nothing about what is learned, in whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.runs import HERE, Toy, differences, state_digests, trained

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

WITHOUT = "placement.workers.rollout=tests.ray.whole_rollout:WholeRollout"
BATCH_FUNCTION = f"reward.path={HERE.parents[1] / 'examples/rewards/batch_reward.py'}"
TWO_RANKS = "placement.pools={main: 1x2, scoring: 1x2 cpu}"
VALIDATED = "validation.every_steps=1"


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm=ppo", VALIDATED),
        ("algorithm=grpo", VALIDATED, TWO_RANKS),
        ("algorithm=grpo", TWO_RANKS, BATCH_FUNCTION),
    ],
    ids=["one rank", "two ranks", "two ranks, batch function"],
)
def test_a_run_learns_the_same_whether_scoring_overlaps_or_not(toy: Toy, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    common = ("checkpoint.save_last=true", f"data.validation_files={toy.data}", *overrides)
    overlapping = trained(toy, tmp_path / "overlapping", *common)
    one_by_one = trained(toy, tmp_path / "one_by_one", *common, WITHOUT)
    assert all("seconds/rollout.take_finished" in line and "seconds/rollout.generate" not in line for line in overlapping)
    assert all("seconds/rollout.generate" in line and "seconds/rollout.take_finished" not in line for line in one_by_one)
    assert not differences(overlapping, one_by_one)
    digests = [state_digests(tmp_path / run / "checkpoints/step_000002") for run in ("overlapping", "one_by_one")]
    assert digests[0] == digests[1]


def test_where_rollout_and_reward_share_a_pool_responses_are_not_handed_over_in_parts(toy: Toy, tmp_path: Path) -> None:
    lines = trained(toy, tmp_path, "algorithm=ppo", "placement.roles={data: scoring, reward: main}")
    assert all("seconds/rollout.generate" in line and "seconds/rollout.take_finished" not in line for line in lines)
