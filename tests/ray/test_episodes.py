"""Whole runs on episodes: at once, ahead of training, and resumed in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.runs import Toy, trained

ENVIRONMENT = """
import asyncio, random

class Echo:
    def reset(self, row):
        self.turns = 0
        return [{"role": "user", "content": str(row["ground_truth"])}], {}

    async def step(self, message):
        self.turns += 1
        if random.random() < 0.2:
            await asyncio.sleep(0.3)  # slow ones hold up nobody
        digits = sum(character.isdigit() for character in message["content"])
        return [{"role": "user", "content": "on"}], float(digits), self.turns == 3, False, {"digits": digits}
"""


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_episodes_are_trained_on_and_go_on_after_a_checkpoint(
    toy: Toy, cluster: None, tmp_path: Path, staleness: int, algorithm: str
) -> None:
    file = tmp_path / "environment.py"
    file.write_text(ENVIRONMENT)
    settings = (
        f"algorithm={algorithm}",
        "algorithm.responses_per_prompt=2",
        f"environment={{path: {file}, max_turn_tokens: 6, rewards: {'turn' if algorithm == 'ppo' else 'episode'}}}",
        "data.max_response_tokens=80",
        f"data.validation_files=[{toy.data}]",
        f"loop.max_staleness={staleness}",
        "checkpoint.every_steps=1",
        "actor.tokens_per_microbatch=512",
    )
    trained(toy, tmp_path / "run", *settings, "run.total_steps=3")
    steps = trained(toy, tmp_path / "run", *settings, "run.total_steps=6")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step["environment/turns"] == 3 and step["reward/failed"] == 0 for step in steps)
    assert all(step["response/tokens_max"] <= 18 for step in steps), "only what the policy sampled counts"
    assert any("validation/environment/digits" in step for step in steps)
    assert max(step.get("staleness/max", 0) for step in steps) == staleness
