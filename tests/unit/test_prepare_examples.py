"""The preparation scripts of examples/, each on a small source, and what the check says of what they write."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from hybridflow.data.check import check_file
from hybridflow.data.prepare import run_from_command_line
from hybridflow.errors import DataError

TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: 1+1?\n\nAssistant: "
SOURCES = {
    "hh": [{"chosen": f"{TALK}2", "rejected": f"{TALK}3"}, {"chosen": f"{TALK}2", "rejected": f"{TALK}2"}],
    "limr": [{"prompt": "1+1?", "answer": 2}, {"problem": "2+2?", "answer": ""}],
    "chats": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
    ],
}
"""The first of each is kept, the second is left out."""


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_prepared_file_has_no_bad_rows(tmp_path: Path, name: str, suffix: str):
    examples = SOURCES[name]
    text = json.dumps(examples) if suffix == "json" else "\n".join(map(json.dumps, examples))
    (tmp_path / f"train.{suffix}").write_text(text)
    module = importlib.import_module(f"examples.{name}.prepare")
    run_from_command_line(module.map_row, hub=module.HUB, arguments=["--local_dir", str(tmp_path), "--source", str(tmp_path)])
    report = check_file(str(tmp_path / "train.parquet"))
    assert (report.num_rows, report.problems, report.unread) == (1, {}, [])


def test_chats_of_parts_and_of_other_roles_are_messages():
    map_row = importlib.import_module("examples.chats.prepare").map_row
    parts = [{"type": "text", "text": "1+1"}, {"type": "text", "text": "?"}]
    row = map_row({"conversation": [{"role": "human", "content": parts}, {"role": "model", "content": "2"}]}, "train", 0)
    assert row == {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
    with pytest.raises(DataError, match="part of type 'image'"):
        map_row({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "train", 0)


def test_turns_of_a_conversation_are_messages(tmp_path: Path):
    row = importlib.import_module("examples.hh.prepare").map_row(SOURCES["hh"][0], "train", 0)
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant", "user"]
    assert row["chosen"] == [{"role": "assistant", "content": "2"}]


def test_a_mixture_has_so_many_rows_of_each(tmp_path: Path):
    limr, gsm8k = importlib.import_module("examples.limr.prepare"), importlib.import_module("examples.gsm8k.prepare")
    for name, module, example in (
        ("a", limr, {"prompt": "1+1?", "answer": "2"}),
        ("b", gsm8k, {"question": "2+2?", "answer": "4\n#### 4"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps([example] * 5))
        arguments = ["--local_dir", str(tmp_path / name), "--source", str(tmp_path / name)]
        run_from_command_line(module.map_row, hub=module.HUB, arguments=arguments)
    files = [str(tmp_path / name / "train.parquet") for name in ("a", "b")]
    output = tmp_path / "mixed.parquet"
    importlib.import_module("examples.mixture.prepare").main(["--files", *files, "--rows", "3", "2", "--output", str(output)])
    assert sorted(pq.read_table(output)["data_source"].to_pylist()) == ["lighteval/MATH"] * 3 + ["openai/gsm8k"] * 2
    assert not check_file(str(output)).problems
