"""What the data says that no reward could use: refused with row and column before anything is generated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.config.schema import AlgorithmConfig, Config, DataConfig, ModelConfig, PlacementConfig, RewardConfig, RewardTerm
from hybridflow.data.chat import tokenizer_at
from hybridflow.data.parquet import without_nulls
from hybridflow.data.prompts import read_prompts
from hybridflow.errors import DataError
from hybridflow.workers.data import DataWorker
from tests.training_rows import context_of


def written(folder: Path, truths: list[object], *, source: str = "openai/gsm8k", prompts: object = None) -> str:
    file = folder / "rows.parquet"
    columns = {
        "prompt": prompts or ["1+1="] * len(truths),
        "reward_model": [{"style": "rule", "ground_truth": truth} for truth in truths],
        "data_source": [source] * len(truths),
    }
    pq.write_table(pa.table(columns), file)
    return str(file)


def opened(model: str, file: str, *, placement: PlacementConfig | None = None, **reward: object) -> DataWorker:
    config = Config(
        model=ModelConfig(path=model),
        data=DataConfig(train_files=(file,), prompts_per_step=1),
        reward=RewardConfig(**reward),
        algorithm=AlgorithmConfig(name="grpo"),
        placement=placement or PlacementConfig(),
    )
    worker = DataWorker(config, context_of("data"))
    worker.open("prompts")
    return worker


BAD = [
    ("by_data_source", [1.0, None, 3.0], r"the float 1.0, .*So it is in 2 other rows", 0),
    ("by_data_source", [72.0, 73.0, 74.0], "the float 72.0, as where one value", 0),
    ("by_data_source", [["72"], ["73"]], r"\['72'\], of type list", 0),
    ("by_data_source", ["72", " "], "blank", 1),
    ("by_data_source", ["72", "seventy"], "'seventy', which is no number", 1),
    ("gsm8k", ["72", None], "null", 1),
    ("gsm8k_flexible", ["72", None], "null", 1),
    ("math", ["x", None], "null", 1),
    ("multiple_choice", ["A", "AB"], "'AB', which is neither a letter", 1),
    ("exact_match", ["a", None], "null", 1),
    ("code", ["assert True", '{"inputs": ["1"], "outputs": []}'], ".*inputs with as many outputs", 1),
]


@pytest.mark.parametrize(("name", "truths", "problem", "row"), BAD)
def test_ground_truths_that_no_answer_can_match_are_refused_with_row_and_column(
    tiny_model: str, tmp_path: Path, name: str, truths: list[object], problem: str, row: int
) -> None:
    file = written(tmp_path, truths)
    with pytest.raises(
        DataError, match=rf"data.train_files: row (\d+).*column 'reward_model.ground_truth' is {problem}"
    ) as raised:
        opened(tiny_model, file, name=name)
    assert f"row {row} " in str(raised.value)


@pytest.mark.parametrize("truths", [["72", "1,234", "-5", "$3", "0.5"], [1, 2, 3], [0.5, 1.5]])
def test_ground_truths_that_can_be_matched_are_taken(tiny_model: str, tmp_path: Path, truths: list[object]) -> None:
    assert opened(tiny_model, written(tmp_path, truths)).train is not None


def test_what_a_function_of_the_users_makes_of_a_ground_truth_is_its_own_affair(tiny_model: str, tmp_path: Path) -> None:
    file = written(tmp_path, [None, None])
    (tmp_path / "mine.py").write_text("def compute_score(x): return 1.0")
    opened(tiny_model, file, path=str(tmp_path / "mine.py"))
    opened(tiny_model, file, name="judge", options={"base_url": "http://x", "model": "m"})
    opened(tiny_model, file, placement=PlacementConfig(workers={"reward": "my.own:Reward"}))


def test_rules_for_other_data_sources_are_not_asked(tiny_model: str, tmp_path: Path) -> None:
    terms = (RewardTerm(name="gsm8k", data_sources=("openai/*",)), RewardTerm(name="none", data_sources=("mine",)))
    opened(tiny_model, written(tmp_path, [None], source="mine"), functions=terms)
    with pytest.raises(DataError, match="is null"):
        opened(tiny_model, written(tmp_path, [None], source="openai/x"), functions=terms)


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({}, "row 0: no reward rule belongs to data_source 'mine'"),
        (
            {"functions": (RewardTerm(name="gsm8k", data_sources=("openai/*",)),)},
            "row 0: no function of reward.functions scores",
        ),
        ({"functions": (RewardTerm(name="gsm8k"), RewardTerm(weight=0.0))}, "row 0: no reward rule belongs"),
    ],
)
def test_a_data_source_that_no_reward_is_for_is_refused_where_the_file_is(
    tiny_model: str, tmp_path: Path, reward: dict[str, object], problem: str
) -> None:
    with pytest.raises(DataError, match=f"data.train_files: {problem}"):
        opened(tiny_model, written(tmp_path, ["1"], source="mine"), **reward)


CALL = [{"role": "user", "content": "look"}, {"role": "assistant", "content": None, "calls": [{"city": "Bern", "n": None}]}]


def test_null_fields_of_merged_structs_reach_nobody_at_any_depth(tiny_model: str, tmp_path: Path) -> None:
    rows = [
        {"a": {"x": 1, "deep": [{"p": 1}, {"q": [{"r": {"s": 2}}]}]}},
        {"b": {"y": "text", "deep": [{"q": [{"t": 3}]}]}},
    ]
    table = {
        "prompt": ["1+1=", "2+2="],
        "reward_model": [{"ground_truth": row} for row in rows],
        "data_source": ["mine", "mine"],
        "extra_info": rows,
    }
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    files = [str(tmp_path / "rows.parquet")]
    columns = read_prompts(files, tokenizer_at(tiny_model), data=DataConfig()).columns(np.arange(2))
    assert columns["extra_info"] == columns["ground_truth"] == rows
    assert without_nulls(CALL) == [CALL[0], {"role": "assistant", "calls": [{"city": "Bern"}]}]


EMPTY = [
    "",
    "  \n",
    [],
    [{"role": "user", "content": ""}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " "}],
]


@pytest.mark.parametrize("prompt", EMPTY)
def test_an_empty_prompt_is_refused_with_its_row(tiny_model: str, tmp_path: Path, prompt: object) -> None:
    good = "1+1=" if isinstance(prompt, str) else [{"role": "user", "content": "1+1="}]
    file = written(tmp_path, ["2", "2"], prompts=[good, prompt])
    with pytest.raises(DataError, match="row 1: the prompt is empty"):
        read_prompts([file], tokenizer_at(tiny_model), data=DataConfig())
