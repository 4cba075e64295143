"""Several rewards and parts from files, as they are configured: read, written back, and refused with their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.config.load import load_config, resolved_yaml
from hybridflow.config.schema import RewardTerm
from tests.unit.config_cases import mistakes_of, right_run

SHORT = "{name: length, options: {max_tokens: 9}, label: short, data_sources: mine/*}"
TERMS = f"reward.functions=[{{name: gsm8k, weight: 0.5}}, {SHORT}]"


def test_several_rewards_are_read_and_written_back(tmp_path: Path) -> None:
    config = load_config(None, [*right_run(tmp_path), TERMS])
    assert config.reward.terms == (
        RewardTerm(name="gsm8k", weight=0.5),
        RewardTerm(name="length", options={"max_tokens": 9}, label="short", data_sources=("mine/*",)),
    )
    file = tmp_path / "again.yaml"
    file.write_text(resolved_yaml(config))
    assert load_config(str(file), []) == config


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("reward.functions=[{nmae: gsm8k}]", "reward.functions.0.nmae: no such key; did you mean 'reward.functions.0.name'"),
        ("reward.functions=[{name: gsm8k, weight: much}]", "reward.functions.0.weight: found 'much' (text); needed: a number"),
        ("reward.functions=[{name: gsm9k}]", "reward.functions.0.name: 'gsm9k' is not known; did you mean 'gsm8k'"),
        ("reward.functions=[{path: nowhere.py}]", "reward.functions.0.path: "),
        ("reward.functions=[{name: length}]", "the function needs 'max_tokens'; set reward.options.max_tokens"),
        ("reward.functions=[{name: judge, options: {modle: m}}]", "does not take reward.options.modle"),
        ("reward.functions=[gsm8k]", "reward.functions.0: found 'gsm8k' (text); this is a section with keys of its own"),
        ("algorithm=nowhere.py:Mine", "algorithm.name: 'nowhere.py:Mine': there is no such file"),
        ("placement.workers.judge=nowhere.py:Mine", "placement.workers.judge: there is no file 'nowhere.py' here"),
        ("rollout.engine=engine.py:Engine", "rollout.engine: there is no file 'engine.py' here"),
    ],
)
def test_mistakes_in_rewards_and_files_are_told_by_their_key(tmp_path: Path, override: str, problem: str) -> None:
    mistakes = mistakes_of([*right_run(tmp_path), override])
    assert any(problem in mistake for mistake in mistakes), mistakes


def test_a_single_reward_beside_several_is_refused(tmp_path: Path) -> None:
    (mistake,) = mistakes_of([*right_run(tmp_path), "reward.functions=[{name: gsm8k}]", "reward.options.x=1"])
    assert "reward.options" in mistake and "reward.functions lists several" in mistake
