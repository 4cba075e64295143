"""A run by verl's keys with a tool and an interaction of verl's form."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.data.prepare import PreparedRow, write_parquet
from hybridflow.train import main
from tests.ray.runs import Toy, metrics_of
from tests.unit.test_verl_tools import TALK, TOOL, entry


@pytest.mark.slow
def test_a_script_with_verls_tools_and_interactions_runs(
    toy: Toy, cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in (("my_tool.py", TOOL), ("talk.py", TALK)):
        (tmp_path / name).write_text(text)
    (tmp_path / "tools.yaml").write_text(f"tools:\n{entry(f'{tmp_path}/my_tool.py:Add', 'add')}")
    talk = f"  - {{name: again, class_name: '{tmp_path}/talk.py:Again', config: {{said: '12 + 1 ='}}}}\n"
    (tmp_path / "talk.yaml").write_text(f"interaction:\n{talk}")
    rows = [
        PreparedRow(
            prompt=[{"role": "user", "content": f"{number} + 1 ="}],
            ground_truth=str(number + 1),
            data_source="toy",
            extra_info={"interaction_kwargs": {"name": "again", "turns": 2}},
        )
        for number in range(16)
    ]
    write_parquet(rows, tmp_path / "train.parquet")
    rollout = "actor_rollout_ref.rollout"
    arguments = [
        "algorithm.adv_estimator=grpo",
        f"data.train_files={tmp_path}/train.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=320",
        "data.max_response_length=60",
        f"actor_rollout_ref.model.path={toy.model}",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        f"{rollout}.name=hf",
        f"{rollout}.n=2",
        f"{rollout}.tensor_model_parallel_size=1",
        f"{rollout}.multi_turn.tool_config_path={tmp_path}/tools.yaml",
        f"{rollout}.multi_turn.interaction_config_path={tmp_path}/talk.yaml",
        f"custom_reward_function.path={Path(__file__).parent}/digit_share.py",
        "trainer.nnodes=1",
        "trainer.n_gpus_per_node=1",
        "trainer.total_training_steps=2",
        f"trainer.default_local_dir={tmp_path}/run",
        "trainer.logger=[console]",
        "trainer.val_before_train=False",
        "trainer.device=cpu",
        "environment.max_turn_tokens=6",
    ]
    assert main(arguments) == 0, "the run failed: see the captured log"
    steps = metrics_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    assert all(step["environment/turns"] == 2 and step["reward/failed"] == 0 for step in steps)
    assert all(step["environment/turn_scores"] == 0.5 for step in steps), "two answers of 0.25"
