"""Prompts from Parquet files, and what is said where a file is not as it should be."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase as Tokenizer

from hybridflow.config.schema import Config, DataConfig, ModelConfig
from hybridflow.data.chat import load_tokenizer
from hybridflow.data.check import check_file
from hybridflow.data.prompts import read_prompts
from hybridflow.errors import DataError, ModelError
from tests.toy import CHAT_TEMPLATE, make_tiny_tokenizer

ROW = {"prompt": "1+1=", "reward_model": {"ground_truth": "2"}, "data_source": "openai/gsm8k"}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Tokenizer:
    return load_tokenizer(Config(model=ModelConfig(path=tiny_model)))


def write(path: Path, *rows: dict[str, object]) -> str:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def first_text(file: str, tokenizer: Tokenizer, **data: object) -> object:
    prompts = read_prompts([file], tokenizer, data=DataConfig(**data))
    return prompts.columns(prompts.row_numbers[:1])["prompt_text"][0]


def test_a_string_becomes_one_user_message_where_there_is_a_template(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert first_text(write(tmp_path / "a.parquet", ROW), tokenizer) == "user: 1+1=\nassistant: "


def test_never_leaves_a_string_as_it_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert first_text(write(tmp_path / "a.parquet", ROW), tokenizer, apply_chat_template="never") == "1+1="


def test_auto_leaves_a_string_as_it_is_where_there_is_no_template(tmp_path: Path) -> None:
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    assert first_text(write(tmp_path / "a.parquet", ROW), bare) == "1+1="


def test_message_lists_go_through_the_template_always(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {**ROW, "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1="}]}
    text = first_text(write(tmp_path / "a.parquet", row), tokenizer, apply_chat_template="never")
    assert text == "system: be brief\nuser: 1+1=\nassistant: "


def test_token_ids_are_those_of_the_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prompts = read_prompts([write(tmp_path / "a.parquet", ROW)], tokenizer, data=DataConfig())
    assert tokenizer.decode(prompts.tokens[0].tolist()) == "user: 1+1=\nassistant: "


@pytest.mark.parametrize(("use", "prompt"), [("always", "1+1="), ("auto", [{"role": "user", "content": "1+1="}])])
def test_a_missing_template_is_named(tmp_path: Path, use: str, prompt: object) -> None:
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        first_text(write(tmp_path / "a.parquet", {**ROW, "prompt": prompt}), bare, apply_chat_template=use)


def test_a_prompt_that_the_template_refuses_is_named_by_its_row(tmp_path: Path) -> None:
    strict = make_tiny_tokenizer()
    strict.chat_template = "{{ raise_exception('no tools') if messages[0]['role'] == 'tool' }}" + CHAT_TEMPLATE
    rows = [{**ROW, "prompt": [{"role": role, "content": "x"}]} for role in ("user", "tool")]
    with pytest.raises(DataError, match=r"row 1: .*refuses the prompt \(no tools\)"):
        read_prompts([write(tmp_path / "a.parquet", *rows)], strict, data=DataConfig())


def test_fields_that_only_other_messages_have_do_not_reach_the_template(tmp_path: Path) -> None:
    naming = make_tiny_tokenizer()
    naming.chat_template = "{% for m in messages %}{{ m.name is defined }}{% endfor %}"
    row = {**ROW, "prompt": [{"role": "user", "content": "a", "name": "bob"}, {"role": "user", "content": "b"}]}
    assert first_text(write(tmp_path / "a.parquet", row), naming) == "TrueFalse"


def long_and_short(tmp_path: Path) -> str:
    rows = [{**ROW, "prompt": "9" * count} for count in (3, 30, 5)]
    return write(tmp_path / "a.parquet", *rows)


def test_overlong_prompts_are_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(max_prompt_tokens=10, apply_chat_template="never")
    prompts = read_prompts([long_and_short(tmp_path)], tokenizer, data=data)
    assert prompts.row_numbers.tolist() == [0, 2]
    assert (prompts.summary.num_overlong, prompts.summary.num_kept, prompts.summary.longest_tokens) == (1, 2, 30)
    assert "1 of 3 rows over data.max_prompt_tokens=10 were dropped" in str(prompts.summary)


def test_overlong_prompts_lose_their_beginning(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(max_prompt_tokens=10, apply_chat_template="never", overlong_prompts="truncate_left")
    prompts = read_prompts([write(tmp_path / "a.parquet", {**ROW, "prompt": "abc0123456789"})], tokenizer, data=data)
    columns = prompts.columns(prompts.row_numbers)
    assert columns["prompt_text"] == ["0123456789"]
    assert columns["prompt_tokens"].tolist() == [10]
    assert "were truncated" in str(prompts.summary)


def test_overlong_prompts_stop_the_run_where_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(max_prompt_tokens=10, apply_chat_template="never", overlong_prompts="error")
    with pytest.raises(DataError, match="row 1: the prompt has 30 tokens"):
        read_prompts([long_and_short(tmp_path)], tokenizer, data=data)


def test_nothing_left_says_how_long_the_shortest_is(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(max_prompt_tokens=2, apply_chat_template="never")
    with pytest.raises(DataError, match=r"0 of 3 prompts are within data.max_prompt_tokens=2; the shortest has 3 tokens"):
        read_prompts([long_and_short(tmp_path)], tokenizer, data=data)


def test_a_file_without_rows_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pq.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="have no rows"):
        read_prompts([str(tmp_path / "a.parquet")], tokenizer, data=DataConfig())


def test_files_may_differ_in_the_types_of_what_is_passed_on(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = write(tmp_path / "a.parquet", {**ROW, "extra_info": {"index": 1}})
    second = write(
        tmp_path / "b.parquet", {**ROW, "reward_model": {"ground_truth": 2}, "prompt": [{"role": "user", "content": "x"}]}
    )
    prompts = read_prompts([first, second], tokenizer, data=DataConfig())
    columns = prompts.columns(prompts.row_numbers[::-1])
    assert columns["ground_truth"] == [2, "2"]
    assert columns["extra_info"] == [{}, {"index": 1}]
    assert columns["prompt_id"].tolist() == [1, 0]
    assert prompts.rows_per_file == (1, 1)


def test_only_the_first_prompts_are_kept_where_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    files = [write(tmp_path / f"{name}.parquet", ROW, ROW, ROW) for name in "ab"]
    prompts = read_prompts(files, tokenizer, data=DataConfig(), max_prompts=4)
    assert prompts.row_numbers.tolist() == [0, 1, 2, 3]


def test_many_rows_keep_their_order_over_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{**ROW, "prompt": str(index), "extra_info": {"index": index}} for index in range(5000)]
    prompts = read_prompts([write(tmp_path / "a.parquet", *rows)], tokenizer, data=DataConfig(apply_chat_template="never"))
    picked = prompts.columns(prompts.row_numbers[[4999, 0, 2048, 2047]])
    assert picked["prompt_text"] == ["4999", "0", "2048", "2047"]
    assert [info["index"] for info in picked["extra_info"]] == [4999, 0, 2048, 2047]


def test_prompts_may_have_limits_of_their_own_and_others_have_the_common_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{**ROW, "max_response_tokens": 7}, {**ROW, "max_response_tokens": None}]
    limited = read_prompts([write(tmp_path / "a.parquet", *rows)], tokenizer, data=DataConfig())
    limits = limited.columns(np.array([1, 0]))["max_response_tokens"]
    assert isinstance(limits, np.ndarray) and limits.tolist() == [np.iinfo(np.int64).max, 7]
    plain = read_prompts([write(tmp_path / "b.parquet", ROW)], tokenizer, data=DataConfig())
    assert "max_response_tokens" not in plain.columns(np.array([0]))


def test_a_limit_below_one_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "a.parquet", {**ROW, "max_response_tokens": 0})
    with pytest.raises(DataError, match="'max_response_tokens' holds 0; a response has at least 1 token"):
        read_prompts([file], tokenizer, data=DataConfig())


def without(name: str) -> dict[str, object]:
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("prompt"), "column 'prompt' is missing.*Expected a string, or a list"),
        (without("reward_model"), "column 'reward_model' is missing.*Expected a struct with the field ground_truth"),
        ({**without("data_source"), "datasource": "x"}, "'data_source' is missing; did you mean 'datasource'"),
        ({**ROW, "prompt": 5}, "column 'prompt' is int64; expected a string"),
        ({**ROW, "prompt": ["a"]}, "column 'prompt' is list<.*string>; expected"),
        ({**ROW, "reward_model": "2"}, "column 'reward_model' is string; expected a struct"),
        ({**ROW, "reward_model": {"truth": "2"}}, "column 'reward_model' is struct<truth: string>; expected"),
        ({**ROW, "extra_info": "x"}, "column 'extra_info' is string; expected a struct"),
    ],
)
def test_a_wrong_column_is_named_with_file_and_what_was_found(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, object], message: str
) -> None:
    file = write(tmp_path / "bad.parquet", row)
    with pytest.raises(DataError, match=rf"data.train_files: .*bad.parquet: .*{message}.*The file has: "):
        read_prompts([file], tokenizer, data=DataConfig())


@pytest.mark.parametrize(("prompt", "problem"), [(None, "column 'prompt' is null"), ("", "the prompt is empty")])
def test_an_unusable_prompt_is_named_by_its_row(tmp_path: Path, tokenizer: Tokenizer, prompt: object, problem: str) -> None:
    file = write(tmp_path / "a.parquet", ROW, {**ROW, "prompt": prompt})
    with pytest.raises(DataError, match=f"a.parquet: row 1: {problem}"):
        read_prompts([file], tokenizer, data=DataConfig(apply_chat_template="never"))


USER = {"role": "user", "content": "1+1="}


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([None], "message 0 of column 'prompt' has no role"),
        ([USER, {"role": None, "content": "x"}], "message 1 of column 'prompt' has no role"),
        ([{"role": "user", "content": None}], "message 0 of column 'prompt' has neither content nor tool_calls"),
        ([USER, {"role": "assistant", "content": "2"}], "column 'prompt' ends with an assistant turn"),
        ([{"role": "user", "content": " "}], "the prompt is empty"),
        ([], "the prompt is empty"),
    ],
)
def test_messages_that_ask_nothing_are_told_alike_by_training_and_by_the_check(
    tmp_path: Path, tokenizer: Tokenizer, prompt: object, problem: str
) -> None:
    file = write(tmp_path / "a.parquet", {**ROW, "prompt": [USER]}, {**ROW, "prompt": prompt})
    with pytest.raises(DataError, match=f"a.parquet: row 1: .*{problem}"):
        read_prompts([file], tokenizer, data=DataConfig())
    assert problem in check_file(file).problems[1]


def test_a_column_that_is_there_twice_is_told(tmp_path: Path, tokenizer: Tokenizer) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'prompt' is there 2 times"):
        read_prompts([str(tmp_path / "a.parquet")], tokenizer, data=DataConfig())


def test_a_missing_file_is_answered_with_the_nearest_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write(tmp_path / "train.parquet", ROW)
    with pytest.raises(DataError, match=r"there is no such file; did you mean 'train.parquet'"):
        read_prompts([str(tmp_path / "trian.parquet")], tokenizer, data=DataConfig())


def test_a_file_of_another_format_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.parquet").write_text(json.dumps(ROW))
    with pytest.raises(DataError, match=r"a.parquet: is not a Parquet file"):
        read_prompts([str(tmp_path / "a.parquet")], tokenizer, data=DataConfig())


def test_a_model_folder_without_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ModelError, match=r"has no tokenizer. Found config.json; expected one of tokenizer.json"):
        load_tokenizer(Config(model=ModelConfig(path=str(tmp_path))))


def test_a_model_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelError, match=r"model.tokenizer='/no/such': there is no such folder"):
        load_tokenizer(Config(model=ModelConfig(path="somewhere", tokenizer="/no/such")))


def test_a_page_that_was_damaged_later_is_told_with_its_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{**ROW, "prompt": f"{number}+{number * 7919}="} for number in range(3000)]
    file = Path(write(tmp_path / "a.parquet", *rows))
    content = bytearray(file.read_bytes())
    content[2000:2200] = b"\xff" * 200
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"data\.train_files: .*a\.parquet: its rows cannot be read .*damaged since"):
        first_text(str(file), tokenizer)


def test_tools_and_options_of_the_template_reach_prompts_and_other_columns_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}{{ tools[0].name }}{% endif %}{{ mood }}:{{ messages[0].content }}"
    rows = [
        {"prompt": "1+1", "tools": '[{"name": "sum"}]', "chat_template_kwargs": '{"mood": "calm"}', "level": 3},
        {"prompt": "2+2", "tools": None, "chat_template_kwargs": None, "level": 1},
    ]
    row = {"reward_model": {"ground_truth": "2"}, "data_source": "x"}
    path = tmp_path / "prompts.parquet"
    pq.write_table(pa.Table.from_pylist([{**row, **more} for more in rows]), path)
    with caplog.at_level(logging.WARNING):
        prompts = read_prompts([str(path)], tokenizer, data=DataConfig(chat_template_options={"mood": "wild"}))
    assert prompts.columns(np.arange(2))["prompt_text"] == ["sumcalm:1+1", "wild:2+2"]
    assert "columns that are not read: level" in caplog.text
