"""Whole runs from Python: a reward model from pairs, GRPO with its score, twice in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hybridflow
from hybridflow.checkpoint.export import export_checkpoint
from hybridflow.evaluate import main as evaluate
from tests.metric_names import unexplained
from tests.toy import make_tiny_model


def files(folder: Path) -> dict[str, str]:
    pairs = [{"prompt": f"{n} + 1 = ", "chosen": "a" * (2 + n % 5), "rejected": "b" * (2 + n % 7)} for n in range(32)]
    prompts = [{"prompt": f"{n} + 1 = ", "data_source": f"s{n % 2}", "reward_model": {"ground_truth": "a"}} for n in range(16)]
    for name, rows in {"pairs": pairs, "prompts": prompts}.items():
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in ("pairs", "prompts")}


def settings(folder: Path, name: str, model: str) -> dict[str, object]:
    return {
        "run": {"folder": str(folder / name), "device": "cpu", "total_steps": 3},
        "model": {"path": model},
        "data": {"prompts_per_step": 8, "max_prompt_tokens": 32, "max_response_tokens": 8},
        "rollout": {"engine": "torch"},
        "validation": {"every_steps": 2, "responses_per_prompt": 2, "temperature": 1.0},
        "trackers": {"names": []},
        "checkpoint": {"resume": "never"},
    }


@pytest.mark.slow
def test_a_reward_model_is_trained_and_then_rewards(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def no_rules(reward_input: Mapping[str, object]) -> dict[str, float]:
        return {"overall": 0.5, "letters": float(len(str(reward_input["response"])))}

    model, paths = make_tiny_model(tmp_path / "model"), files(tmp_path)
    preferences = {"train_files": [paths["pairs"]], "held_out_files": [paths["pairs"]]}
    sizes = {"prompts_per_step": 8, "max_prompt_tokens": 32, "max_response_tokens": 8}
    config = settings(tmp_path, "reward_model", model) | {"algorithm": "reward_model", "data": {**sizes, **preferences}}
    config["reward_model"] = {"learning_rate": 1e-2}
    history = hybridflow.train(config)
    assert not unexplained(history.columns)
    assert history["held_out/accuracy"][-1] > 0.9 > history["held_out/accuracy"][0]
    reward = export_checkpoint(tmp_path / "reward_model", tmp_path / "exported", role="reward_model")

    steps: list[int] = []
    prompts = {"train_files": [paths["prompts"]], "validation_files": [paths["prompts"]]}
    config = settings(tmp_path, "grpo", model) | {"data": {**sizes, **prompts}, "reward": {"name": no_rules}}
    config |= {"reward_model": {"path": str(reward), "weight": 2.0}, "algorithm": {"name": "grpo", "responses_per_prompt": 2}}
    history = hybridflow.train(config, on_step=lambda step, metrics: steps.append(step) or step < 2)
    assert steps == history.steps == [0, 1, 2]
    for column in ("reward", "validation/reward"):
        total, rules, scores = history[f"{column}/mean"][-1], history[f"{column}/rules"][-1], history[f"{column}/model"][-1]
        assert rules == 0.5
        assert total == pytest.approx(rules + 2.0 * scores, rel=1e-4)
    assert "validation/s1/pass@2" in history.columns and not unexplained(history.columns)
    rollouts = pd.read_parquet(tmp_path / "grpo" / "rollouts" / "2.parquet")
    assert rollouts["reward"].mean() == pytest.approx(history["reward/mean"][-1], rel=1e-4)
    assert rollouts["response_text"].str.len().mean() == pytest.approx(rollouts["reward/letters"].mean())

    arguments = [str(tmp_path / "grpo"), "--data", paths["prompts"], "--output", str(tmp_path / "eval"), "--responses", "4"]
    assert evaluate([*arguments, "--temperature", "1.0", "reward.name=exact_match"]) == 0
    assert "majority@4" in capsys.readouterr().out
    assert len(pd.read_parquet(tmp_path / "eval" / "rows.parquet")) == 64
