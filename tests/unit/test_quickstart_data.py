"""The quickstart's problems and toy models."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart import make_data, make_model
from hybridflow.rewards.gsm8k import compute_score

SEED = 3


@pytest.fixture(scope="module")
def problems() -> tuple[list[dict], list[dict]]:
    return make_data.make_problems(SEED)


@pytest.fixture(scope="module", params=["arithmetic", "bytes"])
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_model.write_model(folder, kind=request.param, seed=SEED)
    return folder


@pytest.fixture(scope="module")
def arithmetic_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic_only")
    make_model.write_model(folder, kind="arithmetic", seed=SEED)
    return folder


def score(row: dict) -> float:
    return compute_score({"response": row["response"], "ground_truth": row["reward_model"]["ground_truth"]})["overall"]


def test_no_problem_is_in_both_files(problems: tuple[list[dict], list[dict]]):
    train, validation = ({row["prompt"] for row in rows} for rows in problems)
    assert len(validation) == 1024
    assert len(train) == 10_000 - 1024
    assert not train & validation


def test_ground_truths_are_right(problems: tuple[list[dict], list[dict]]):
    for row in [*problems[0], *problems[1]]:
        first, second = row["prompt"].removesuffix("=").split("+")
        assert int(first) + int(second) == int(row["reward_model"]["ground_truth"])


def test_right_responses_score_one(problems: tuple[list[dict], list[dict]]):
    assert {score(row) for row in problems[1]} == {1.0}


def test_half_of_the_demonstrations_are_wrong(problems: tuple[list[dict], list[dict]]):
    # Of 8,976 fair coins the share of heads has a standard deviation of 0.0053: four of them either way.
    # The few sums below 3 whose slip would go below zero stay right or become less wrong, which is far below that.
    share = sum(map(score, problems[0])) / len(problems[0])
    assert abs(share - 0.5) < 0.022


def test_problems_are_a_function_of_the_seed(problems: tuple[list[dict], list[dict]]):
    assert make_data.make_problems(SEED) == problems
    assert make_data.make_problems(SEED + 1) != problems


def test_files_have_the_documented_columns(tmp_path: Path):
    train, validation = make_data.write_data(tmp_path / "new", seed=SEED)
    expected = {"data_source", "prompt", "response", "reward_model", "extra_info"}
    assert set(pq.read_schema(train).names) == set(pq.read_schema(validation).names) == expected


def test_every_problem_survives_the_tokenizer(arithmetic_folder: Path, problems: tuple[list[dict], list[dict]]):
    tokenizer = AutoTokenizer.from_pretrained(arithmetic_folder)
    for row in problems[0][:500]:
        for text in (row["prompt"], row["response"]):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_problems_have_one_token_per_digit_and_one_for_the_mark(arithmetic_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(arithmetic_folder)
    assert len(tokenizer("437+8=")["input_ids"]) == 6
    assert len(tokenizer("#### 445")["input_ids"]) == 4


@pytest.mark.parametrize("text", ["plain #### 7", "Größe: 5 €\n\tund Emoji 🙂", "  two  spaces "])
def test_bytes_read_any_text(tmp_path: Path, text: str):
    make_model.write_model(tmp_path, kind="bytes", seed=SEED)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_have_a_chat_template_whose_marks_are_single_tokens():
    tokenizer = make_model.bytes_tokenizer()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    # <|im_start|> "user\n" "hi" <|im_end|> "\n" <|im_start|> "assistant\n"
    assert len(tokenizer(chat)["input_ids"]) == 1 + 5 + 2 + 1 + 1 + 1 + 10


def test_every_token_has_a_row_in_the_embedding(model_folder: Path):
    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), AutoModelForCausalLM.from_pretrained(model_folder)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id


def test_weights_are_a_function_of_the_seed(arithmetic_folder: Path, tmp_path: Path):
    make_model.write_model(tmp_path / "same", kind="arithmetic", seed=SEED)
    make_model.write_model(tmp_path / "other", kind="arithmetic", seed=SEED + 1)
    weights = (arithmetic_folder / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != weights


def test_a_model_folder_is_an_ordinary_qwen2(model_folder: Path):
    assert json.loads((model_folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
