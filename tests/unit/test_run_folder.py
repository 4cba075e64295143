"""A run has its folder for itself."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.algorithms.ppo import Config as PpoOptions
from hybridflow.checkpoint.lineage import FOLDERS
from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller import run_folder
from hybridflow.controller.run_folder import reserved
from hybridflow.errors import ConfigError, FolderInUseError, RunFolderError
from tests.unit.counting_run import command


def config_of(folder: Path) -> Config:
    config = Config(run=RunConfig(folder=str(folder)))
    return replace(config, algorithm=replace(config.algorithm, options=PpoOptions()))


def test_a_second_run_is_told_who_has_the_folder_and_changes_nothing_there(tmp_path: Path) -> None:
    with reserved(config_of(tmp_path / "run")) as reserved_folder:
        folder = reserved_folder.path
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
    assert killed.returncode == -9 and (tmp_path / "lock").read_text().startswith('{"host"')
    with reserved(config_of(tmp_path)):
        pass


def test_a_folder_that_cannot_be_made_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match=r"run\.folder: .*file/run cannot be written: Not a directory"),
        reserved(config_of(tmp_path / "file/run")),
    ):
        pass


@pytest.fixture
def fast_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "HEARTBEAT_S", 0.1)


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)


@pytest.mark.usefixtures("fast_heart", "without_locks")
def test_without_locks_a_second_run_is_stopped_by_the_heartbeat_of_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_use = pytest.raises(FolderInUseError, match=rf"process {os.getpid()} on ")
    with reserved(config_of(tmp_path)), in_use, reserved(config_of(tmp_path)):
        pass
    assert any("without locks" in record.getMessage() for record in caplog.records)
    with reserved(config_of(tmp_path)):
        pass


@pytest.mark.usefixtures("fast_heart", "without_locks")
def test_without_locks_the_folder_of_a_dead_run_is_free(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text('{"host": "elsewhere", "process": 1, "start": "x"}')
    with reserved(config_of(tmp_path)) as taken:
        taken.check()


@pytest.mark.usefixtures("fast_heart")
def test_a_lock_that_holds_on_one_node_only_is_not_believed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text('{"host": "elsewhere", "process": 1, "start": "x"}')
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(lock)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(FolderInUseError, match="process 1 on elsewhere"), reserved(config_of(tmp_path)):
            pass
    finally:
        ended.set()
        heart.join()


def test_a_run_whose_folder_another_one_has_taken_says_so(tmp_path: Path) -> None:
    with reserved(config_of(tmp_path)) as taken:
        taken.check()
        (tmp_path / "lock").write_text('{"host": "elsewhere", "process": 7, "start": "y"}')
        with pytest.raises(RunFolderError, match=r"taken by process 7 on elsewhere.*another run\.folder"):
            taken.check()


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.rename", "pathlib.Path.mkdir"])
def test_a_file_system_on_which_checkpoints_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "run").mkdir()

    def fails(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(call, fails)
    with (
        pytest.raises(ConfigError, match=r"run\.folder: .* cannot be written.*Read-only"),
        reserved(config_of(tmp_path / "run")),
    ):
        pass


def test_folders_that_cannot_be_flushed_are_a_warning_and_checkpoints_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    ended = command(tmp_path / "run")
    assert not ended.message and len(CheckpointStore(tmp_path / "run").own()) == 4
    assert any("cannot flush folders" in record.getMessage() for record in caplog.records)


def test_too_little_room_for_the_next_checkpoint_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command(tmp_path / "run", run__total_steps="2")
    monkeypatch.setattr(run_folder, "free_bytes", lambda folder: 10)
    command(tmp_path / "run", run__total_steps="4")
    assert any("has 10 free bytes" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("gone", ["metrics.jsonl", "lock", "."])
@pytest.mark.parametrize("is_replaced", [False, True])
def test_what_is_removed_or_replaced_during_a_run_ends_it_with_an_error(tmp_path: Path, gone: str, is_replaced: bool) -> None:
    folder = tmp_path / "run"

    def hook(step: int) -> None:
        if step == 3:
            (folder / gone).rename(tmp_path / "moved")
            if is_replaced:
                moved = tmp_path / "moved"
                shutil.copytree(moved, folder) if moved.is_dir() else shutil.copy(moved, folder / gone)

    ended = command(folder, hook)
    assert ended.message and str(folder) in ended.message


@pytest.mark.parametrize("name", ["metrics.jsonl", "timeline.json", "run.json", "lock", "checkpoints", "aside", "rollouts"])
@pytest.mark.parametrize("kind", ["of the other kind", "a link to itself"])
def test_what_is_in_the_way_of_a_runs_files_is_told_before_anything_is_trained(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "a link to itself":
        path.symlink_to(path)
    elif name in FOLDERS:
        path.touch()
    else:
        path.mkdir()
    with pytest.raises(ConfigError, match=f"{name} is no .* Move it away"), reserved(config_of(tmp_path)):
        pass
    path.rename(tmp_path / "away")
    with reserved(config_of(tmp_path)):
        pass


def test_a_damaged_lock_and_folders_that_are_links_are_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"\xff\xfe")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with reserved(config_of(tmp_path)) as taken:
        taken.check()
