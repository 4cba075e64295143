"""Chats and preferences: what is learned, what is left out, and what is said of bad rows."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import Qwen2Tokenizer

from hybridflow.config.schema import DataConfig
from hybridflow.data.conversations import CHAT_COLUMNS, Conversations
from hybridflow.data.examples import BadRowError, Example, Examples, UselessRowError, read_examples
from hybridflow.data.marks import Template, marked
from hybridflow.data.preferences import PREFERENCE_COLUMNS, Preferences
from hybridflow.errors import DataError
from tests.toy import CHAT_TEMPLATE, make_tiny_tokenizer

CHAT = [
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3+4"},
    {"role": "assistant", "content": "7"},
]
CHATML = (
    "{% for m in messages %}{{ '<bos>' + m.role + '\n' + m.content + '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<bos>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<eos>' }}{% endgeneration %}{% else %}{{ m.content + '<eos>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)
FORGETS_THOUGHTS = (
    "{% for m in messages %}{{ '<bos>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% elif m.role == 'assistant' and '</think>' not in m.content %}{{ '<think></think>' + m.content }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<eos>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)


def tokenizer_of(template: str = CHATML) -> Qwen2Tokenizer:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def learned(tokenizer: Qwen2Tokenizer, example: Example) -> str:
    return tokenizer.decode([token for token, is_learned in zip(example.response, example.mask, strict=True) if is_learned])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_what_the_assistant_says_is_learned_with_its_end(template: str):
    tokenizer = tokenizer_of(template)
    (example,) = Conversations(tokenizer, DataConfig())({"messages": CHAT})
    assert tokenizer.decode(example.prompt) == "<bos>user\n1+1<eos>\n<bos>assistant\n"
    assert learned(tokenizer, example) == "2<eos>7<eos>"
    assert tokenizer.decode(example.prompt + example.response) == tokenizer.apply_chat_template(CHAT, tokenize=False).rstrip(
        "\n"
    )


def test_a_template_that_does_not_end_turns_gets_an_end_of_sequence_after_the_last():
    tokenizer = tokenizer_of(CHAT_TEMPLATE)
    (example,) = Conversations(tokenizer, DataConfig())({"messages": CHAT})
    assert learned(tokenizer, example) == "27<eos>"


def test_a_turn_is_found_where_the_template_forgets_its_thoughts():
    tokenizer = tokenizer_of(FORGETS_THOUGHTS)
    chat = [
        {**message, "content": f"<think>hm</think>{message['content']}"} if i % 2 else message for i, message in enumerate(CHAT)
    ]
    (example,) = Conversations(tokenizer, DataConfig())({"messages": chat})
    assert learned(tokenizer, example) == "2<eos><think>hm</think>7<eos>"
    (example,) = Conversations(tokenizer, DataConfig())({"messages": CHAT})
    assert learned(tokenizer, example) == "2<eos><think></think>7<eos>"


def test_turns_before_the_first_that_counts_are_context():
    tokenizer = tokenizer_of()
    found = marked(Template(tokenizer, {}), CHAT, first=2)
    assert tokenizer.decode([token for token, mark in zip(found.ids, found.mask, strict=True) if mark]) == "7<eos>"


def test_a_turn_of_weight_zero_is_context():
    chat = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[2], {**CHAT[3], "weight": 1}]
    tokenizer = tokenizer_of()
    make = Conversations(tokenizer, DataConfig())
    (example,) = make({"messages": chat})
    assert learned(tokenizer, example) == "7<eos>"
    with pytest.raises(UselessRowError, match="weight 0"):
        make({"messages": chat[:2]})
    with pytest.raises(BadRowError, match="message 1 of column 'messages' has the weight '0'; expected a number"):
        make({"messages": [CHAT[0], {**CHAT[1], "weight": "0"}]})
    pair = {"prompt": CHAT[:1], "chosen": [{**CHAT[1], "weight": 0}], "rejected": [CHAT[3]]}
    with pytest.raises(UselessRowError, match="of its own in column 'chosen' has the weight 0"):
        Preferences(tokenizer, DataConfig())(pair)


WRITES_CALLS = CHATML.replace("m.content", "m.content + (m.tool_calls[0].function.name if m.tool_calls else '')")


def calling(name: str, **fields: object) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": {}}}], **fields}


@pytest.mark.parametrize("asked", ["1+1", "use weather"])  # what others say is not the turn
def test_a_tool_call_that_the_template_does_not_write_is_no_empty_turn(asked: str):
    chat = [{"role": "user", "content": asked}, calling("weather"), *CHAT[2:]]
    with pytest.raises(BadRowError, match="does not write the tool call of 'weather'"):
        Conversations(tokenizer_of(), DataConfig())({"messages": chat})
    (example,) = Conversations(tokenizer_of(WRITES_CALLS), DataConfig())({"messages": chat})
    assert "weather" in example.response_text


def test_a_tool_call_of_a_turn_that_is_not_learned_need_not_be_written():
    tokenizer = tokenizer_of()
    make = Conversations(tokenizer, DataConfig())
    for chat in ([*CHAT[:3], calling("weather", weight=0)], [CHAT[0], calling("weather", weight=0), CHAT[2], CHAT[1]]):
        (example,) = make({"messages": chat})
        assert learned(tokenizer, example) == "2<eos>"


def test_a_tool_call_is_found_whatever_the_tokenizer_makes_of_its_name():
    tokenizer = tokenizer_of(WRITES_CALLS)
    (example,) = Conversations(tokenizer, DataConfig())({"messages": [CHAT[0], calling("getWeather")]})
    assert "getWeather" not in tokenizer.decode(example.response)  # it has no capital letters
    assert learned(tokenizer, example).endswith("<eos>")


def written(path: Path, rows: list[dict[str, object]], **types: pa.DataType) -> str:
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, table.column(name).cast(kind))
    pq.write_table(table, path)
    return str(path)


def chats(path: str) -> Examples:
    return read_examples([path], CHAT_COLUMNS, Conversations(tokenizer_of(), DataConfig()), key="data.train_files")


def preferences(path: str) -> Examples:
    make = Preferences(tokenizer_of(), DataConfig())
    return read_examples([path], PREFERENCE_COLUMNS, make, key="data.train_files", per_row=2)


def test_chats_without_an_assistant_turn_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"messages": CHAT[:1]}, {"messages": CHAT}, {"messages": CHAT[:1]}]
    with caplog.at_level(logging.WARNING):
        dataset = chats(written(tmp_path / "chats.parquet", rows))
    assert len(dataset) == 1
    assert dataset.row_numbers.tolist() == [1]
    assert (
        "2 of 3 rows are left out: the conversation has no assistant turn: its roles are user; the first is row 0"
        in caplog.text
    )


def test_a_file_of_which_nothing_can_be_learned_says_why(tmp_path: Path):
    path = written(tmp_path / "chats.parquet", [{"messages": [CHAT[0], {"role": "model", "content": "2"}]}])
    with pytest.raises(DataError, match=r"none of 1 rows can be learned from: .* its roles are model, user"):
        chats(path)


def test_malformed_rows_are_named_and_counted(tmp_path: Path):
    rows = [{"messages": CHAT}, {"messages": []}, {"messages": [{"role": None, "content": "x"}]}, {"messages": None}]
    with pytest.raises(DataError) as caught:
        chats(written(tmp_path / "chats.parquet", rows))
    message = str(caught.value)
    assert "3 of 4 rows are malformed" in message
    assert "row 1: column 'messages' is empty" in message
    assert "row 2: message 0 of column 'messages' has no role" in message
    assert "row 3: column 'messages' is null" in message


def test_columns_that_nobody_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        chats(written(tmp_path / "chats.parquet", [{"messages": CHAT, "score": 1.0, "source": "x"}]))
    assert "columns that are not read: score, source" in caplog.text


def test_options_of_the_template_and_tools_reach_it():
    template = "{% if tools %}{{ tools[0].name }}{% endif %}{{ mood }}" + CHATML
    tokenizer = tokenizer_of(template)
    row = {"messages": CHAT, "tools": '[{"name": "sum"}]', "chat_template_kwargs": {"mood": "calm"}}
    (example,) = Conversations(tokenizer, DataConfig(chat_template_options={"mood": "wild"}))(row)
    assert tokenizer.decode(example.prompt).startswith("sumcalm<bos>user")


@pytest.mark.parametrize(("given", "mood"), [('{"mood": null}', ""), ({"mood": None}, "wild"), ("null", "wild")])
def test_a_null_that_a_row_wrote_goes_before_the_configuration_and_one_that_parquet_filled_in_not(given: object, mood: str):
    tokenizer = tokenizer_of("{{ mood or '' }}" + CHATML)
    row = {"messages": CHAT, "chat_template_kwargs": given}
    (example,) = Conversations(tokenizer, DataConfig(chat_template_options={"mood": "wild"}))(row)
    assert tokenizer.decode(example.prompt).startswith(f"{mood}<bos>user")


PAIR_TEXT = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
ANSWERS = {"chosen": [{"role": "assistant", "content": "2"}], "rejected": [{"role": "assistant", "content": "3"}]}


@pytest.mark.parametrize(
    "row",
    [
        PAIR_TEXT,
        {"prompt": CHAT[:1], **ANSWERS},
        {"prompt": "1+1", **ANSWERS},
        {name: CHAT[:1] + turn for name, turn in ANSWERS.items()},
        {"prompt": "1+1", **{name: CHAT[:1] + turn for name, turn in ANSWERS.items()}},
    ],
)
def test_a_pair_may_be_written_as_texts_or_messages_with_or_without_its_prompt(row: dict[str, object]):
    tokenizer = tokenizer_of()
    chosen, rejected = Preferences(tokenizer, DataConfig())(row)
    assert tokenizer.decode(chosen.prompt) == tokenizer.decode(rejected.prompt) == "<bos>user\n1+1<eos>\n<bos>assistant\n"
    assert (learned(tokenizer, chosen), learned(tokenizer, rejected)) == ("2<eos>", "3<eos>")


def test_texts_without_a_prompt_share_it():
    tokenizer = tokenizer_of()
    row = {"chosen": "\n\nhuman: 1+1\n\nassistant: two", "rejected": "\n\nhuman: 1+1\n\nassistant: three"}
    chosen, rejected = Preferences(tokenizer, DataConfig())(row)
    assert tokenizer.decode(chosen.prompt) == "\n\nhuman: 1+1\n\nassistant:"
    assert (learned(tokenizer, chosen), learned(tokenizer, rejected)) == (" two<eos>", " three<eos>")


def test_bad_preferences_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [PAIR_TEXT, {**PAIR_TEXT, "chosen": None}, {**PAIR_TEXT, "rejected": ""}, {**PAIR_TEXT, "rejected": "2"}]
    with pytest.raises(
        DataError, match=r"2 of 4 rows are malformed: row 1: column 'chosen' is null; row 2: column 'rejected' is empty"
    ):
        preferences(written(tmp_path / "pairs.parquet", rows))
    with caplog.at_level(logging.WARNING):
        dataset = preferences(written(tmp_path / "pairs.parquet", [rows[0], rows[3]]))
    assert len(dataset) == 1
    assert "1 of 2 rows are left out: 'chosen' and 'rejected' are the same; the first is row 1" in caplog.text


def test_columns_of_pairs_come_two_by_two(tmp_path: Path):
    dataset = preferences(written(tmp_path / "pairs.parquet", [{**PAIR_TEXT, "margin": 0.5}, {**PAIR_TEXT, "margin": 1.5}]))
    columns = dataset.columns(dataset.rows_of(dataset.row_numbers)[[1, 0]])
    assert columns["pair"].tolist() == [0, 0, 1, 1]
    assert columns["margin"].tolist() == [1.5, 1.5, 0.5, 0.5]
    assert columns["prompt_id"].tolist() == [1, 1, 0, 0]


def test_a_preference_file_without_its_columns_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"column 'chosen' is missing"):
        preferences(written(tmp_path / "pairs.parquet", [{"prompt": "1+1", "rejected": "3"}]))
