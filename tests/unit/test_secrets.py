"""What is referred to in the environment reaches whoever needs it, and no file."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path

import pytest

from hybridflow.config.load import load_config, resolved_yaml
from hybridflow.config.schema import Config
from hybridflow.config.secrets import as_written
from tests.unit.config_cases import right_run
from tests.unit.counting_run import CountingLoop, NoRows, reserved

SECRET = "sk-a$b{c}'d\"e: f#g"
RULE = "def compute_score(solution_str, ground_truth, **options):\n    return 0.0\n"


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A configuration with references of every kind, in a file, on the command line and in verl's words."""
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setenv("SHORT", "x1")
    (tmp_path / "rule.py").write_text(RULE)
    options = """
    plain: ${oc.env:JUDGE_KEY}
    header: 'Bearer ${oc.env:JUDGE_KEY}'
    again: ${reward.options.header}
    nested: {list: ['${oc.env:JUDGE_KEY}', x]}
    short: ${oc.env:SHORT}
    fallback: ${oc.env:ABSENT,none}
    literal: 'costs \\${5}'
    """
    (tmp_path / "run.yaml").write_text(f"reward:\n  path: {tmp_path}/rule.py\n  options:{options}")
    overrides = [
        f"run.folder={tmp_path}/run",
        "checkpoint.save_last=true",
        "reward.options.line=${oc.env:JUDGE_KEY}",
        "custom_reward_function.reward_kwargs.verl=${oc.env:JUDGE_KEY}",
    ]
    return load_config(str(tmp_path / "run.yaml"), [*right_run(tmp_path), *overrides])


def test_a_function_is_given_the_value(given: Config):
    options = pickle.loads(pickle.dumps(deepcopy(given))).reward.options
    assert options["plain"] == options["line"] == options["verl"] == options["nested"]["list"][0] == SECRET
    assert options["header"] == options["again"] == f"Bearer {SECRET}"
    assert (options["short"], options["fallback"], options["literal"]) == ("x1", "none", "costs ${5}")


def test_a_file_is_given_the_reference_and_reads_back_as_the_same(given: Config, tmp_path: Path):
    text = resolved_yaml(given)
    assert "sk-a" not in text and "Bearer ${oc.env:JUDGE_KEY}" in text
    (tmp_path / "again.yaml").write_text(text)
    assert load_config(str(tmp_path / "again.yaml")) == given
    assert resolved_yaml(load_config(str(tmp_path / "again.yaml"))) == text


def test_no_file_of_a_run_has_the_value(given: Config, tmp_path: Path):
    with reserved(given) as folder:
        loop = CountingLoop(given, folder, lambda step: None)
        loop.total_steps = 2
        loop.run()
    files = [path for path in Path(given.run.folder).rglob("*") if path.is_file()]
    assert {"config.yaml", "state.json"} <= {path.name for path in files}
    assert not [path for path in files if b"sk-a" in path.read_bytes()]


def test_what_services_are_told_of_a_run_has_references(given: Config):
    assert "sk-a" not in repr(as_written(given)["reward"])


def test_a_resumed_run_does_not_take_its_secrets_for_changed(given: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for steps in (2, 4):
        with reserved(given) as folder:
            loop = CountingLoop(given, folder, lambda step: None)
            loop.total_steps = loop.checkpoints.total_steps = steps
            loop.run()
    assert isinstance(loop.rows, NoRows) and not [text for text in caplog.messages if "settings that differ" in text]
