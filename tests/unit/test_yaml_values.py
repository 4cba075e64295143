"""What is written plainly in YAML or on the command line means what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.config.load import load_config, to_yaml
from hybridflow.config.yaml_values import read_yaml
from hybridflow.errors import ConfigError
from tests.unit.config_cases import right_run

TEXTS = ("010", "12:30", "1:30.5", "0b11", "0o17", "2024-01-01", "2024_01", "1_000", "no", "off", "y", "00", "1.2.3", "0777")
"""Numbers, times and truths by version 1.1 of YAML, or by some readers, and text by what it looks like."""


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_file", [True, False])
def test_what_other_readers_take_for_something_else_stays_text(tmp_path: Path, text: str, is_file: bool):
    lines = [f"run.folder={tmp_path}/{text}", f"trackers.project={text}", f"trackers.run_name={text}"]
    overrides = right_run(tmp_path) + ([] if is_file else lines)
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{line.replace('=', ': ', 1)}\n" for line in lines) if is_file else "run: {}\n")
    config = load_config(str(path), overrides)
    assert (config.trackers.project, config.trackers.run_name) == (text, text)


@pytest.mark.parametrize("text", ["010", "12:30", "0b11", "1:30", "-07"])
@pytest.mark.parametrize("key", ["run.seed", "run.total_steps", "actor.learning_rate"])
def test_a_number_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, key: str, text: str):
    with pytest.raises(ConfigError, match=rf"{key}: found '{text}' \(text\)"):
        load_config(None, [*right_run(tmp_path), f"{key}={text}"])


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("run.total_steps=1_000", 1000),
        ("run.seed=+3", 3),
        ("actor.learning_rate=1e-6", 1e-6),
        ("actor.learning_rate=5", 5.0),
        ("data.shuffle=off", False),
        ("data.shuffle=False", False),
        ("model.compile=yes", True),
        ("run.total_steps=null", None),
    ],
)
def test_what_can_be_meant_in_one_way_only_is_read(tmp_path: Path, setting: str, expected: object):
    config = load_config(None, [*right_run(tmp_path), setting])
    section, _, name = setting.partition("=")[0].partition(".")
    found = vars(vars(config)[section])[name]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value", [*TEXTS, "null", "~", "true", "1e-6", "5", ".5", "0x1F", ".inf", "", " a", "a: b", "<<", "${x", 5, 0.5, None]
)
def test_what_is_written_is_read_back(value: object):
    assert read_yaml(to_yaml({"key": value, "list": [value]})) == {
        "key": value.replace("${", "\\${") if isinstance(value, str) else value,
        "list": [value.replace("${", "\\${") if isinstance(value, str) else value],
    }


def test_a_key_that_is_given_twice_is_refused_with_its_line(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("run:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:3: YAML: found duplicate key seed"):
        load_config(str(path))
