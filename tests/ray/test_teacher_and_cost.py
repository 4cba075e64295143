"""Whole runs with a teacher, with costs from a function and from a model, and with text beside what is generated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

import hybridflow
from tests.ray.test_stages import files, settings
from tests.toy import make_tiny_model

pytestmark = [pytest.mark.usefixtures("cluster"), pytest.mark.slow]


def length_and_cost(reward_input: Mapping[str, object]) -> dict[str, float]:
    """Longer is better, and costs more than it is worth."""
    length = len(str(reward_input["response"])) / 8
    return {"overall": length, "cost": 2 * length - 0.5}


def run(folder: Path, name: str, steps: int = 20, **sections: object) -> hybridflow.api.History:
    model, paths = make_tiny_model(folder / "model"), files(folder)
    config = settings(folder, name, model)
    config["run"] |= {"total_steps": steps}
    config["data"] |= {"train_files": [paths["prompts"]]}
    return hybridflow.train(config | {"actor": {"learning_rate": 3e-3}} | sections)


def test_a_pupil_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    teacher = make_tiny_model(tmp_path / "teacher", seed=1)
    algorithm = {"name": "distillation", "prompts_per_update": 4}
    reward = {"name": "none"}
    history = run(tmp_path, "distillation", algorithm=algorithm, teacher={"path": teacher}, reward=reward)
    distance = history["distillation/reverse_kl"]
    assert sum(distance[-3:]) < 0.8 * sum(distance[1:4])  # step 0 has none


def test_costs_above_the_limit_raise_the_multiplier_and_fall(tmp_path: Path) -> None:
    algorithm = {"name": "safe_rlhf", "multiplier_rate": 0.2, "kl_in": "none", "prompts_per_update": 4}
    history = run(tmp_path, "costs", algorithm=algorithm, reward={"name": length_and_cost})
    cost, multiplier = history["safe_rlhf/cost"], history["safe_rlhf/multiplier"]
    assert cost[1] > 0 and multiplier[2] > multiplier[1] == 1.0
    assert sum(cost[-3:]) < 0.8 * sum(cost[1:4])


def test_costs_may_come_from_a_model(tmp_path: Path) -> None:
    folder, algorithm = tmp_path / "cost", {"name": "safe_rlhf", "kl_in": "loss", "cost_limit": -100.0}
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path / "as_a_model"))
    config = Qwen2Config.from_pretrained(tmp_path / "as_a_model", num_labels=1)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    history = run(tmp_path, "model", steps=3, algorithm=algorithm, cost_model={"path": str(folder)}, reward={"name": "none"})
    assert history["safe_rlhf/multiplier"][-1] > 1.0, "no cost is as low as the limit"
    assert len(set(history["safe_rlhf/cost"])) > 1


def test_text_beside_what_is_generated_becomes_more_likely(tmp_path: Path) -> None:
    text = [{"prompt": f"{n}", "response": "the same old song"} for n in range(12)]
    pq.write_table(pa.Table.from_pylist(text), tmp_path / "text.parquet")
    algorithm = {"name": "ppo_ptx", "prompts_per_update": 4, "pretraining_files": [str(tmp_path / "text.parquet")]}
    history = run(tmp_path, "ptx", algorithm=algorithm, reward={"name": length_and_cost})
    found = history["actor/pretraining_loss"]
    assert sum(found[-3:]) < 0.5 * sum(found[1:4])
    assert history["reward/mean"][-1] > 0
