"""The preparation scripts: from a dataset's examples to files that training reads."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.config.schema import Config, DataConfig, ModelConfig, RewardConfig
from hybridflow.data.chat import load_tokenizer
from hybridflow.data.loader import build_loaders
from hybridflow.data.prepare import PreparedRow, map_rows, prepare, run_from_command_line, write_parquet
from hybridflow.data.prompts import read_prompts
from hybridflow.errors import DataError
from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Score

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = REPOSITORY.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason="the real datasets are not in ../shared/data")
GSM8K_INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
MATH_INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", REPOSITORY / "examples" / name / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_jsonl(path: Path, examples: Iterable[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path.parent


def prepared(name: str, tmp_path: Path, *examples: object) -> list[dict[str, object]]:
    """The rows that a script writes for training examples."""
    source = write_jsonl(tmp_path / "source" / "train.jsonl", examples)
    module = script(name)
    prepare(module.map_row, hub=module.HUB, source=source, local_dir=tmp_path / "out")
    rows: list[dict[str, object]] = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    return rows


def test_gsm8k_rows_have_the_documented_schema(tmp_path: Path) -> None:
    answer = "48 + 24 = 72\n#### 1,072"
    (row,) = prepared("gsm8k", tmp_path, {"question": "How many?", "answer": answer})
    assert row == {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"How many? {GSM8K_INSTRUCTION}"}],
        "reward_model": {"style": "rule", "ground_truth": "1072"},
        "response": answer,
        "extra_info": {"split": "train", "index": 0, "question": "How many?", "answer": answer},
    }


def test_math_takes_the_last_box_of_the_solution(tmp_path: Path) -> None:
    solution = r"First \boxed{1}, so \boxed{\frac{1}{2}}."
    (row,) = prepared("math", tmp_path, {"problem": "Half?", "solution": solution})
    assert row["prompt"] == [{"role": "user", "content": f"Half? {MATH_INSTRUCTION}"}]
    assert row["reward_model"] == {"style": "rule", "ground_truth": r"\frac{1}{2}"}
    assert row["response"] == solution


def test_an_instruction_that_the_problem_brings_is_not_repeated(tmp_path: Path) -> None:
    problem = r"Half? Put your final answer within \boxed{}."
    (row,) = prepared("math", tmp_path, {"problem": problem, "answer": "1"})
    assert row["prompt"] == [{"role": "user", "content": problem}]
    assert "response" not in row


def test_the_hook_of_a_new_dataset_may_leave_examples_out(tmp_path: Path) -> None:
    rows = prepared("new_dataset", tmp_path, {"prompt": "a", "answer": ""}, {"prompt": "b", "answer": "3"})
    assert [row["extra_info"] for row in rows] == [{"split": "train", "index": 1}]


@pytest.mark.parametrize(
    ("name", "example", "problem"),
    [
        ("gsm8k", {"question": "q", "solution": "s"}, r"train, example 0: field 'answer' is missing; the example has question"),
        ("gsm8k", {"question": "q", "answer": "72"}, r"example 0: the answer does not end in '#### NUMBER': '72'"),
        ("gsm8k", {"question": 1, "answer": "#### 1"}, r"field 'question' is a int \(1\); expected a string"),
        ("math", {"problem": "q", "solution": "no box"}, r"the solution has no \\boxed"),
        ("math", {"problem": "q"}, "field 'answer' is missing"),
    ],
)
def test_an_example_that_does_not_fit_is_named(tmp_path: Path, name: str, example: object, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        prepared(name, tmp_path, example)


def test_a_folder_without_splits_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("")
    module = script("gsm8k")
    with pytest.raises(DataError, match=r"expected train or test as .jsonl, .json, .parquet; found data.csv"):
        prepare(module.map_row, hub=module.HUB, source=tmp_path, local_dir=tmp_path)


@pytest.mark.parametrize(
    ("line", "problem"), [("{", r"train.jsonl:2: is not JSON"), ("[1]", r"train.jsonl:2: expected one object")]
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n' + line)
    module = script("gsm8k")
    with pytest.raises(DataError, match=problem):
        prepare(module.map_row, hub=module.HUB, source=tmp_path, local_dir=tmp_path / "out")


def test_the_command_line_says_where_the_files_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "test.jsonl", [{"question": "q", "answer": "#### 1"}])
    module = script("gsm8k")
    arguments = ["--local_dir", str(tmp_path / "out"), "--source", str(source)]
    run_from_command_line(module.map_row, hub=module.HUB, arguments=arguments)
    assert capsys.readouterr().out == f"{tmp_path}/out/test.parquet: 1 rows\n"


def test_the_command_line_ends_with_the_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("gsm8k")
    with pytest.raises(SystemExit) as ended:
        run_from_command_line(module.map_row, hub=module.HUB, arguments=["--local_dir", "x", "--source", str(tmp_path / "no")])
    assert ended.value.code == 1
    assert re.fullmatch(r"--source .*no such folder\n", capsys.readouterr().err)


def test_a_response_in_some_rows_only_is_refused(tmp_path: Path) -> None:
    row = PreparedRow(prompt="q", ground_truth="1", data_source="x")
    with pytest.raises(DataError, match="1 of 2 rows have a response"):
        write_parquet([row, PreparedRow(prompt="q", ground_truth="1", data_source="x", response="r")], tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no rows to write"):
        write_parquet(map_rows([], lambda *_: row, split="train"), tmp_path / "a.parquet")


def test_a_file_written_by_hand_loads(tiny_model: str, tmp_path: Path) -> None:
    """The variant with a string prompt and only the ground truth in reward_model, beside columns that nobody reads."""
    table = {
        "prompt": ["How many clips?"],
        "reward_model": [{"ground_truth": "72"}],
        "data_source": ["openai/gsm8k"],
        "level": [3],
    }
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    config = Config(model=ModelConfig(path=tiny_model), data=DataConfig(train_files=(str(tmp_path / "train.parquet"),)))
    train = build_loaders(config, load_tokenizer(config), "prompts").train
    batch = train.next_batch(1).select([0])
    assert batch.objects("ground_truth") == ["72"]
    assert batch.objects("extra_info") == [{}]


@pytest.mark.real_data
@needs_real_data
def test_all_of_gsm8k_is_prepared_tokenised_and_scored(tiny_model: str, tmp_path: Path) -> None:
    module = script("gsm8k")
    prepare(module.map_row, hub=module.HUB, source=REAL_DATA / "gsm8k", local_dir=tmp_path)
    tokenizer = load_tokenizer(Config(model=ModelConfig(path=tiny_model)))
    prompts = read_prompts([str(tmp_path / "test.parquet")], tokenizer, data=DataConfig(max_prompt_tokens=4096))
    assert (len(prompts), prompts.summary.num_overlong) == (1319, 0)
    columns = prompts.columns(prompts.row_numbers)
    infos, truths = columns["extra_info"], columns["ground_truth"]
    pool = RewardPool(RewardConfig())
    scores = pool.score(
        [
            RewardInput(response=info["answer"], ground_truth=truth, data_source="openai/gsm8k", extra_info=info, prompt="")
            for info, truth in zip(infos, truths, strict=True)
        ]
    )
    pool.close()
    assert all(isinstance(score, Score) and score.reward == 1.0 for score in scores)


@pytest.mark.real_data
@needs_real_data
def test_math_500_is_prepared_as_it_stands(tmp_path: Path) -> None:
    module = script("math")
    prepare(module.map_row, hub=module.HUB, source=REAL_DATA / "math500", local_dir=tmp_path)
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert len(rows) == 500
    assert all(MATH_INSTRUCTION not in row["prompt"][0]["content"] for row in rows)
