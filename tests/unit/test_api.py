"""Training from Python: what may be given, and what comes back. Whole runs are in tests/ray."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hybridflow
from hybridflow import api, pickled, registry
from hybridflow.algorithms.sft import SFT
from hybridflow.config.schema import Config
from hybridflow.errors import ConfigError
from tests.toy import make_tiny_model
from tests.unit.test_data_check import GOOD, written


def settings(folder: Path) -> dict[str, object]:
    return {
        "run": {"folder": str(folder / "run"), "device": "cpu"},
        "model": {"path": make_tiny_model(folder / "model")},
        "data": {
            "train_files": [written(folder, [GOOD])],
            "prompts_per_step": 1,
            "max_response_tokens": 64,
            "max_prompt_tokens": 64,
        },
        "rollout": {"engine": "torch"},
        "checkpoint": {"resume": "never"},
    }


def loaded(folder: Path, *overrides: str, **sections: object) -> Config:
    return api._loaded(settings(folder), overrides, sections)


def test_a_dict_is_read_like_a_file_with_sections_and_overrides_over_it(tmp_path: Path):
    config = loaded(tmp_path, "run.seed=3", run={"total_steps": 7}, algorithm="grpo")
    assert (config.run.seed, config.run.total_steps, config.algorithm.name) == (3, 7, "grpo")
    assert config.run.folder == str(tmp_path / "run")


def test_mistakes_in_a_dict_are_all_named(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, run={"sed": 1}, actor={"learning_rate": "much"})
    assert "in Python: run.sed: no such key; did you mean 'run.seed'?" in str(caught.value)
    assert "actor.learning_rate" in str(caught.value)


def test_classes_and_functions_stand_for_their_names(tmp_path: Path):
    def exact(reward_input: dict[str, object]) -> float:
        return float(reward_input["response"] == reward_input["ground_truth"])

    config = loaded(tmp_path, algorithm=SFT, reward={"name": exact})
    assert config.algorithm.name == "hybridflow.algorithms.sft:SFT"
    assert config.reward.name == f"hybridflow.pickled:{tmp_path}/run/objects/reward.name.pkl"
    assert registry.load(config.reward.name, {}, key="reward.name") is exact
    assert loaded(tmp_path, reward=exact).reward.name == config.reward.name


def test_another_process_finds_what_was_pickled(tmp_path: Path):
    offset = 3
    name = pickled.name_of(lambda number: number + offset, tmp_path / "objects" / "x.pkl")
    code = f"from hybridflow import registry; print(registry.load({name!r}, {{}}, key='x')(4))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "7"


def test_the_module_of_the_command_is_called_as_the_function(tmp_path: Path):
    from hybridflow.train import main  # from here on hybridflow.train is the module

    assert callable(main)
    with pytest.raises(ConfigError, match=r"run.sed: no such key"):
        hybridflow.train({**settings(tmp_path), "run": {"sed": 1}})


def test_metrics_come_back_as_columns():
    history = api.History(Path("x"))
    history.add(0, {"validation/accuracy": 0.5})
    history.add(1, {"loss": 2.0})
    history.add(2, {"loss": 1.0, "validation/accuracy": 0.75})
    assert history.steps == [0, 1, 2]
    assert math.isnan(history["loss"][0])
    assert history["loss"][1:] == [2.0, 1.0]
    assert history.to_pandas().loc[2, "validation/accuracy"] == 0.75
    with pytest.raises(KeyError, match="'los' was not measured"):
        history["los"]
    assert pickle.loads(pickle.dumps(history)).steps == [0, 1, 2]


@pytest.mark.parametrize(
    "first", ["from hybridflow import train", "import hybridflow; train = hybridflow.train", "import hybridflow.train as train"]
)
def test_the_function_is_the_module_of_the_command_however_it_is_imported(first: str) -> None:
    code = f"{first}; import hybridflow; assert hybridflow.train is train and callable(train) and callable(train.main)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
