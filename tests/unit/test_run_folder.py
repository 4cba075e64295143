"""A run has its folder for itself."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.algorithms.ppo import Config as PpoOptions
from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller.run_folder import reserved
from hybridflow.errors import ConfigError, FolderInUseError


def config_of(folder: Path) -> Config:
    config = Config(run=RunConfig(folder=str(folder)))
    return replace(config, algorithm=replace(config.algorithm, options=PpoOptions()))


def test_a_second_run_is_told_who_has_the_folder_and_changes_nothing_there(tmp_path: Path) -> None:
    with reserved(config_of(tmp_path / "run")) as folder:
        (folder / "config.yaml").write_text("of the first")
        with (
            pytest.raises(FolderInUseError, match=rf"in use by process {os.getpid()} on ") as caught,
            reserved(config_of(folder)),
        ):
            pass
        assert str(folder) in str(caught.value) and "another folder" in str(caught.value)
        assert (folder / "config.yaml").read_text() == "of the first"
        with reserved(config_of(tmp_path / "other")):
            pass
    with reserved(config_of(folder)):
        assert "folder:" in (folder / "config.yaml").read_text()


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import os, signal; from tests.unit.test_run_folder import config_of, reserved; from pathlib import Path\n"
        f"with reserved(config_of(Path({str(tmp_path)!r}))): os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert killed.returncode == -9 and (tmp_path / "lock").read_text().startswith("process ")
    with reserved(config_of(tmp_path)):
        pass


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"run\.folder: .*file/run cannot be written: Not a directory"),
        reserved(config_of(tmp_path / "file/run")),
    ):
        pass
