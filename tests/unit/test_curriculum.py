"""Orders of an epoch that are not by chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.batch import Batch
from hybridflow.config.schema import Config, DataConfig, ModelConfig
from hybridflow.controller.batch_metrics import success_rates
from hybridflow.data.chat import load_tokenizer
from hybridflow.data.loader import PromptLoader, build_loaders
from hybridflow.workers.data import DataWorker
from tests.toy import make_tiny_model
from tests.training_rows import context_of

LEVELS = [3, 1, None, 2, 1, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def loader(folder: Path, model: str, curriculum: str | None, **data: object) -> PromptLoader:
    row = {"data_source": "x", "reward_model": {"ground_truth": "1"}}
    pq.write_table(
        pa.Table.from_pylist([{**row, "prompt": f"{n}", "level": v} for n, v in enumerate(LEVELS)]), folder / "f.parquet"
    )
    settings = DataConfig(train_files=(str(folder / "f.parquet"),), prompts_per_step=3, curriculum=curriculum, **data)
    config = Config(model=ModelConfig(path=model), data=settings)
    return build_loaders(config, load_tokenizer(config), "prompts").train


def epoch(prompts: PromptLoader, step: int = 1) -> list[int]:
    return [int(row) for part in range(2) for row in prompts.next_batch(step + part)["prompt_id"]]


def test_a_column_orders_each_epoch_from_low_to_high(tmp_path: Path, model: str):
    drawn = epoch(loader(tmp_path, model, "level"))
    assert [LEVELS[row] for row in drawn] == [1, 1, 2, 3, 3, None]
    assert epoch(loader(tmp_path, model, "level", shuffle=False)) == [1, 4, 3, 0, 5, 2]


def test_success_orders_the_next_epoch_and_a_resumed_one_alike(tmp_path: Path, model: str):
    prompts = loader(tmp_path, model, "success_rate", shuffle=False)
    assert epoch(prompts) == [0, 1, 2, 3, 4, 5]
    prompts.note_success(np.array([0, 1, 2, 3]), np.array([0.0, 1.0, 0.25, 0.75]))
    first = [int(row) for row in prompts.next_batch(3)["prompt_id"]]
    prompts.note_success(np.array([4, 5]), np.array([1.0, 0.0]))  # the epoch that has begun keeps its order
    state = json.loads(json.dumps(prompts.state_dict()))
    resumed = loader(tmp_path, model, "success_rate", shuffle=False)
    resumed.load_state_dict(state)
    rest = [int(row) for row in prompts.next_batch(4)["prompt_id"]]
    assert first + rest == [1, 3, 4, 5, 2, 0]
    assert [int(row) for row in resumed.next_batch(4)["prompt_id"]] == rest
    assert epoch(resumed, 5) == epoch(prompts, 5) == [1, 4, 3, 2, 0, 5]


def test_a_checkpoint_holds_the_success_rates(tmp_path: Path, model: str):
    drawn = []
    for resumes in (False, True):
        prompts = loader(tmp_path, model, "success_rate", shuffle=False)
        worker = opened_with(prompts)
        epoch(prompts)
        prompts.note_success(np.array([0, 1, 2, 3]), np.array([0.0, 1.0, 0.25, 0.75]))
        worker.save(str(tmp_path))
        if resumes:
            prompts = loader(tmp_path, model, "success_rate", shuffle=False)
            opened_with(prompts).restore(str(tmp_path))
        drawn.append(epoch(prompts, 3))
    assert drawn[0] == drawn[1] == [1, 3, 4, 5, 2, 0]


def opened_with(prompts: PromptLoader) -> DataWorker:
    worker = DataWorker(Config(), context_of("data"))
    worker.train = prompts
    return worker


def test_a_success_rate_is_of_a_prompt():
    rows = Batch({"prompt_id": np.array([7, 7, 3]), "reward": np.array([1.0, 0.0, 1.0], np.float32)})
    rates = success_rates(rows, 1.0)
    assert (rates["prompt_id"].tolist(), rates["rate"].tolist()) == ([3, 7], [1.0, 0.5])
