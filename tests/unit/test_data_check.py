"""`python -m hybridflow.data check`: every bad row is said, by number."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.data.__main__ import main
from tests.toy import make_tiny_model

GOOD = {"data_source": "openai/gsm8k", "prompt": "1+1=", "reward_model": {"ground_truth": "2"}}
TURN = {"role": "assistant", "content": "2"}


def written(folder: Path, rows: list[dict[str, object]]) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = main(["check", *arguments])
    return code, [line.partition(".parquet: ")[2] for line in capsys.readouterr().out.splitlines()]


def test_a_good_file_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert said(capsys, written(tmp_path, [GOOD])) == (0, ["prompts: 1 of 1 rows can be used"])


def test_every_bad_prompt_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        {**GOOD, "prompt": None, "notes": "x"},
        {**GOOD, "reward_model": {"ground_truth": None}},
        {**GOOD, "data_source": ""},
        GOOD,
    ]
    assert said(capsys, written(tmp_path, rows)) == (
        1,
        [
            "row 0: column 'prompt' is null",
            "row 1: column 'reward_model' has no ground_truth",
            "row 2: column 'data_source' is null or empty",
            "columns that are not read: notes",
            "prompts: 1 of 4 rows can be used",
        ],
    )


def test_ground_truths_that_no_answer_matches_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [GOOD, {**GOOD, "reward_model": {"ground_truth": "two"}}, {**GOOD, "data_source": "sums"}]
    path = written(tmp_path, rows)
    bad = "row 1: column 'reward_model.ground_truth' is 'two', which is no number: no answer can match it by reward.name="
    unruled = "data_source 'sums' (1 rows) has no rule of its own: name one as --reward, or write a function"
    assert said(capsys, path) == (1, [bad + "by_data_source", unruled, "prompts: 2 of 3 rows can be used"])
    assert said(capsys, path, "--reward", "gsm8k") == (1, [bad + "gsm8k", "prompts: 2 of 3 rows can be used"])
    assert said(capsys, path, "--reward", "none") == (0, ["prompts: 3 of 3 rows can be used"])


def test_every_bad_pair_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    user = {"role": "user", "content": "1+1"}
    rows = [
        {"chosen": [user, TURN], "rejected": [user, {**TURN, "content": "3"}]},
        {"chosen": [user, TURN], "rejected": [user, TURN]},
        {"chosen": [user], "rejected": [user, TURN]},
        {"chosen": None, "rejected": [user, TURN]},
        {"chosen": [user, TURN], "rejected": [{**user, "content": "2+2"}, TURN]},
    ]
    assert said(capsys, written(tmp_path, rows))[1] == [
        "row 1: left out: 'chosen' and 'rejected' are the same",
        "row 2: column 'chosen' has no assistant turn of its own",
        "row 3: column 'chosen' is null",
        "row 4: 'chosen' and 'rejected' begin with different messages: they answer different prompts",
        "preferences: 1 of 5 rows can be used",
    ]


def test_what_would_spoil_a_step_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pair = {"prompt": "1+1", "chosen": "2", "rejected": "3"}
    rows = [
        {**pair, "margin": 0.5},
        {**pair, "margin": None},
        {**pair, "margin": float("nan")},
        {**pair, "margin": float("inf")},
    ]
    found = said(capsys, written(tmp_path, rows))[1]
    bad = [f"row {row}: column 'margin' holds {held}; expected a finite number" for row, held in ((2, "nan"), (3, "inf"))]
    assert found == [*bad, "preferences: 2 of 4 rows can be used"]
    user = {"role": "user", "content": "1+1"}
    rows = [{"chosen": [user, TURN, user], "rejected": [user, {**TURN, "content": "3"}]}]
    assert "row 0: column 'chosen' ends with a turn of role 'user'" in said(capsys, written(tmp_path, rows))[1][0]
    rows = [{**GOOD, "chat_template_kwargs": "[1]"}, {**GOOD, "reward_model": None, "chat_template_kwargs": None}]
    assert said(capsys, written(tmp_path, rows))[1][:2] == [
        "row 0: column 'chat_template_kwargs' holds [1]; expected names and values",
        "row 1: column 'reward_model' has no ground_truth",
    ]


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"prompt": "1+1", "completion": "2", "label": True}, "as for KTO"),
        ({"prompt": "1+1", "completion": "2"}, "Call texts 'response'"),
        ({"prompt": "1+1", "response_j": "2", "response_k": "3"}, "pairs under other names"),
        ({"prompt": "1+1", "ground_truth": "2"}, "what 'reward_model' should hold"),
        ({**GOOD, "images": ["x"]}, "pictures, which are not read"),
        ({"conversations": [{"from": "gpt", "value": "2"}]}, "examples/chats/prepare.py writes them"),
        ({"instruction": "1+1", "input": "", "output": "2"}, "Alpaca's form"),
        ({"question": "1+1", "answer": "2"}, "examples/new_dataset/prepare.py"),
    ],
)
def test_a_file_in_another_form_is_told_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, object], form: str
):
    assert main(["check", written(tmp_path, [row])]) == (2 if "prompt" not in row else int("images" in row))
    shown = capsys.readouterr()
    assert form in shown.out + shown.err


@pytest.mark.parametrize("images", [None, [], pa.array([[]], pa.list_(pa.string()))])
def test_a_column_of_pictures_without_any_is_only_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], images: object):
    table = pa.Table.from_pylist([GOOD]).append_column("images", images if isinstance(images, pa.Array) else pa.array([images]))
    pq.write_table(table, tmp_path / "rows.parquet")
    found = ["columns that are not read: images", "prompts: 1 of 1 rows can be used"]
    assert said(capsys, str(tmp_path / "rows.parquet")) == (0, found)


def test_a_missing_column_is_told_beside_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = {"prompt": "1", "reward_model": {"ground_truth": "1"}, "images": ["x"]}
    assert main(["check", written(tmp_path, [row])]) == 2
    told = capsys.readouterr().err
    assert "'data_source' is missing" in told and "docs/data.md shows how" in told and "pictures" not in told
    assert main(["check", written(tmp_path, [{"question": "1", "answer": "2"}])]) == 2
    assert "to learn the answers call them 'response'. docs/data.md shows how" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row", [{**GOOD, "answer": "2", "ground_truth": "2"}, {"prompt": "1", "question": "1", "chosen": "2", "rejected": "3"}]
)
def test_columns_beside_those_of_a_form_of_ours_are_only_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict):
    assert said(capsys, written(tmp_path, [row]))[0] == 0


def test_messages_as_json_text_are_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = '[{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]'
    pairs = [
        {"prompt": "1+1", "chosen": text, "rejected": text.replace("2", "3")},
        {"prompt": "a", "chosen": "[{", "rejected": "b"},
        {"prompt": "1+1", "chosen": text.replace("[{", "[\n {"), "rejected": "b"},
        {"prompt": "1+1", "chosen": "[]", "rejected": "[" + "1" * 5000 + "]"},
    ]
    assert said(capsys, written(tmp_path, pairs))[1] == [
        "row 0: column 'chosen' is JSON text of messages: write the file with json.loads of it",
        "row 2: column 'chosen' is JSON text of messages: write the file with json.loads of it",
        "preferences: 2 of 4 rows can be used",
    ]
    assert "row 0: column 'prompt' is JSON text" in said(capsys, written(tmp_path, [{**GOOD, "prompt": text}]))[1][0]


@pytest.mark.filterwarnings("ignore:The 'convert_dates' keyword")  # pandas 3 says so; pandas 2 needs it
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.jsonl", '{"date": "2020-01-01", "response": "42"}\n{"date": "NA", "response": "007"}\n'),
        ("rows.json", '[{"date": "2020-01-01", "response": "42"}, {"date": "NA", "response": "007"}]'),
        ("rows.csv", "date,response\n2020-01-01,42\nNA,007\n"),
    ],
)
def test_what_is_told_of_files_of_other_kinds_writes_their_texts_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, text: str
):
    pandas = pytest.importorskip("pandas")
    (tmp_path / name).write_text(text)
    assert main(["check", str(tmp_path / name)]) == 2
    _, found, command = capsys.readouterr().err.partition("this writes one: ")
    monkeypatch.chdir(tmp_path)
    assert found and exec(command, {"pandas": pandas}) is None
    rows = [{"date": "2020-01-01", "response": "42"}, {"date": "NA", "response": "007"}]
    assert pq.read_table("rows.parquet").to_pylist() == rows


def test_a_file_without_rows_is_not_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = written(tmp_path, [GOOD])
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert said(capsys, path) == (1, ["prompts: 0 of 0 rows can be used"])


def test_with_a_tokenizer_lengths_and_templates_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = make_tiny_model(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": "1" * 40}, TURN]}, {"messages": [{"role": "user", "content": "1"}, TURN]}]
    found = said(capsys, written(tmp_path, rows), "--tokenizer", model, "--max-prompt-tokens", "30")
    assert found == (
        1,
        ["row 0: left out: the prompt is longer than data.max_prompt_tokens", "chats: 1 of 2 rows can be used"],
    )


def test_what_is_no_data_file_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "x.parquet").write_text("no")
    assert main(["check", str(tmp_path / "x.parquet")]) == 2
    assert "is not a Parquet file" in capsys.readouterr().err


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    os.mkfifo(tmp_path / "rows.parquet")
    assert main(["check", str(tmp_path / "rows.parquet")]) == 2
    assert "rows.parquet: is no ordinary file" in capsys.readouterr().err
