"""Parts from outside the package, named in the configuration, in whole runs: the files that the README shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.runs import Toy, trained

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
JUDGED = "algorithm=examples.extend.brevity_judge:JudgedRLOO"
JUDGE = "placement.workers.judge=examples.extend.brevity_judge:JudgeWorker"


def test_an_algorithm_of_ones_own_trains(toy: Toy, tmp_path: Path) -> None:
    lines = trained(toy, tmp_path, "algorithm=examples.extend.rloo:RLOO", "algorithm.responses_per_prompt=3")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["actor/grad_norm"] > 0 for line in lines)
    # Roles are those that the class declares: no critic, no reference.
    assert not [name for name in lines[0] if name.startswith(("critic/", "seconds/critic", "seconds/reference"))]


def test_a_role_of_ones_own_on_a_pool_of_its_own_judges_every_response(toy: Toy, tmp_path: Path) -> None:
    pools = "placement.pools={main: 1x1, scoring: 1x1 cpu, judges: 1x2 cpu}"
    roles = "placement.roles={data: scoring, reward: scoring, judge: judges}"
    lines = trained(toy, tmp_path, JUDGED, JUDGE, pools, roles)
    for line in lines:
        # The penalty is the share of 8 allowed tokens that a response took, so its mean is that of the lengths.
        assert line["judge/penalty"] == pytest.approx(line["response/tokens_mean"] / 8)
        assert line["seconds/judge.judge"] > 0


def test_an_engine_of_ones_own_generates_with_the_actors_weights(toy: Toy, tmp_path: Path) -> None:
    lines = trained(toy, tmp_path, "rollout.engine=examples.extend.transformers_engine:TransformersEngine")
    assert all(line["mismatch/max"] < 1e-4 for line in lines)
    assert lines[1]["kl/mean"] != 0, "the first step changed the policy that the second step generated with"


@pytest.mark.parametrize(
    ("file", "metrics"),
    [
        ("gsm8k_reward.py", {"reward/accuracy", "reward/format"}),
        ("batch_reward.py", {"reward/accuracy"}),
        ("four_argument_reward.py", set()),
    ],
)
def test_a_reward_function_of_ones_own_scores(toy: Toy, tmp_path: Path, file: str, metrics: set[str]) -> None:
    lines = trained(toy, tmp_path, "algorithm=grpo", f"reward.path={EXAMPLES / 'rewards' / file}")
    for line in lines:
        assert line["reward/failed"] == 0
        assert 0 <= line["reward/mean"] <= 1
        assert metrics <= line.keys()
