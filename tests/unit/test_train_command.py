"""What the command says to what it is given, in a dry run, and when a run is stopped."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.checkpoint.store import CheckpointStore, RunState
from hybridflow.config.load import load_config
from hybridflow.config.schema import CheckpointConfig, Config, RunConfig
from hybridflow.controller.boundary import how_to_go_on
from hybridflow.controller.launch import check_files
from hybridflow.errors import ConfigError
from hybridflow.train import main
from tests.unit.config_cases import CUTTING_ENGINE, right_run

ELSEWHERE = [
    "model.path=models/not/here",
    "data.train_files=absent.parquet",
    "reward.path=absent.py",
    "placement.pools={main: 2x8}",
    "placement.roles={}",
    "run.device=cuda",
    "checkpoint.resume=absent",
]
"""A plan for two nodes of eight GPUs."""


@pytest.fixture
def yaml_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A right run as a file, on a machine without GPU where no cluster is known."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    lines = [override.replace("=", ": ", 1) for override in right_run(tmp_path)]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "run.yaml")


def test_a_dry_run_of_a_plan_for_other_machines_shows_it_and_warns_of_what_is_missing_here(
    yaml_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hybridflow.config.rules.is_installed", lambda package: package not in ("vllm", "peft"))
    code = main([yaml_file, *ELSEWHERE, "rollout.engine=vllm", "model.lora_rank=8", "--dry-run"])
    output = capsys.readouterr()
    assert code == 0, output.err
    assert "actor on pool 'main': 2 node(s) x 8 GPU(s), data parallel 16 [" in output.out
    keys = ("model.path", "data.train_files", "reward.path", "placement.pools.main", "rollout.engine", "model.lora_rank")
    for key in (*keys, "checkpoint.resume"):
        (warning,) = [message for message in caplog.messages if f"command line: {key}: " in message]
        assert warning.startswith("not on this machine: ")


def sources(folder: Path, *names: str) -> str:
    """A file of a prompt of each data source."""
    row = {"prompt": "1+1", "response": "2", "reward_model": {"ground_truth": "2"}}
    pq.write_table(pa.Table.from_pylist([{**row, "data_source": name} for name in names]), folder / "sources.parquet")
    return str(folder / "sources.parquet")


UNKNOWN = "1 of 3 rows cannot be scored: no reward rule belongs to data_source 'openai/gsm8kk'; did you mean 'openai/gsm8k'?"
NEITHER = "3 of 3 rows cannot be scored: no function of reward.functions scores data_source 'openai/gsm8k'"


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["data.validation_files=FILE"], {"data.validation_files": UNKNOWN}),
        (["data.train_files=FILE", "data.validation_files=FILE", "algorithm=sft"], {"data.validation_files": UNKNOWN}),
        (["data.train_files=FILE"], {"data.train_files": UNKNOWN}),
        (["data.train_files=FILE", "reward.functions=[{data_sources: [mine]}]"], {"data.train_files": NEITHER}),
        (["data.validation_files=FILE", "validation.max_prompts=2"], {}),
        (["data.validation_files=FILE", "reward.name=gsm8k"], {}),
        (["data.validation_files=FILE", "placement.workers={reward: 'tests.unit.runs:Own'}"], {}),
    ],
)
def test_a_data_source_that_no_reward_is_for_is_told_before_anything_starts(
    yaml_file: str, tmp_path: Path, overrides: list[str], problems: dict[str, str]
) -> None:
    file = sources(tmp_path, "openai/gsm8k", "openai/gsm8k", "openai/gsm8kk")
    config = load_config(yaml_file, [override.replace("FILE", file) for override in overrides])
    try:
        check_files(config)
        found = {}
    except ConfigError as error:
        found = {each.key: each.problem for each in error.errors}
    assert found.keys() == problems.keys()
    assert all(found[key].startswith(problem) for key, problem in problems.items())


def test_a_dry_run_with_a_mistake_that_every_machine_would_find_fails(
    yaml_file: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main([yaml_file, *ELSEWHERE, "rollout.tensor_parallel=3", CUTTING_ENGINE, "--dry-run"]) == 2
    output = capsys.readouterr()
    assert not output.out and output.err.startswith("1 error in the configuration:\n  command line: rollout.tensor_parallel: ")
    assert any("data.train_files" in message for message in caplog.messages)


def test_what_is_a_warning_in_a_dry_run_stops_a_run(yaml_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([yaml_file, *ELSEWHERE]) == 2
    assert "data.train_files: file 'absent.parquet' does not exist" in capsys.readouterr().err


def test_a_class_that_does_not_import_ends_a_dry_run_as_a_mistake(yaml_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([yaml_file, "model.path=/absent", "placement.workers.actor=no_such_package.x:Y", "--dry-run"]) == 2
    assert "placement.workers.actor: 'no_such_package.x:Y' needs module" in capsys.readouterr().err


def test_columns_that_the_files_lack_are_told_before_anything_starts(
    yaml_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = tmp_path / "lacking.parquet"
    pq.write_table(pa.table({"question": ["1+1"], "prompt": [1]}), lacking)
    files = [f"data.train_files={lacking}", f"data.validation_files={lacking}", "data.curriculum=level", "rollout.engine=torch"]
    assert main([yaml_file, *files, "--dry-run"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "2 errors in the configuration:"
    assert (
        told[1].startswith(f"  data.train_files: {lacking}: column 'prompt' is int64; ")
        and "column 'level' is missing" in told[1]
    )
    assert told[2].startswith(f"  data.validation_files: {lacking}: ") and "level" not in told[2]


def test_a_command_without_a_file_starts_from_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*right_run(tmp_path), "run.seed=5", "model.path=org/name", "--dry-run"]) == 0
    assert "seed: 5" in capsys.readouterr().out


def test_a_config_name_of_hydras_is_the_file(yaml_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(Path(yaml_file).parent)
    assert main([f"--config-path={folder}", "--config-name", "run", "run.seed=6", "--cfg", "job"]) == 0
    assert "seed: 6" in capsys.readouterr().out
    assert main([f"--config-path={folder}", "--config-name=absent", "run.seed=6", "--dry-run"]) == 2
    assert "absent.yaml" in capsys.readouterr().err
    assert main(["--config-name=ppo_trainer", yaml_file, " ", "run.seed=7", "--dry-run"]) == 0


@pytest.mark.parametrize("name", ["dapo_trainer", "ppo_trainer.yaml", "fully_async_ppo_trainer"])
def test_a_file_that_is_called_like_one_of_verls_is_read(
    tmp_path: Path, yaml_file: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{name.removesuffix('.yaml')}.yaml").write_text(f"base: {yaml_file}\nrun: {{seed: 8}}\n")
    hydra = [f"--config-path={tmp_path}", f"--config-name={name}", "--dry-run"]
    assert main(hydra) == 0
    assert "seed: 8" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([yaml_file, *hydra])
    assert f"and --config-name {name}; give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["-m", "--multirun", "--info", "--package=x", "--hydra-help"])
def test_other_flags_of_hydras_are_refused_by_name(yaml_file: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([yaml_file, flag])
    assert "of Hydra's is not known here: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resume", "has_checkpoint", "expected"),
    [
        ("auto", False, "There is no checkpoint yet: the same command starts anew."),
        ("never", False, "There is no checkpoint yet: the same command starts anew."),
        ("auto", True, "The same command continues after {newest}."),
        ("never", True, "The same command would start anew; to continue after {newest}, checkpoint.resume=auto"),
    ],
)
def test_a_stopped_run_says_what_the_same_command_would_do(
    tmp_path: Path, resume: str, has_checkpoint: bool, expected: str
) -> None:
    store = CheckpointStore(tmp_path)
    if has_checkpoint:
        with store.writing(3) as folder:
            store.write_state(folder, RunState(step=3, config={}, algorithm={}))
    config = Config(run=RunConfig(folder=str(tmp_path)), checkpoint=CheckpointConfig(resume=resume))
    assert how_to_go_on(config) == expected.format(newest=store.latest())
