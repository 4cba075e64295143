"""A folder belongs to one run: its history is never mixed with another's, and nothing of either is lost."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.checkpoint.lineage import ASIDE, RECORD, read_record
from hybridflow.checkpoint.resume import goes_on_in_its_folder, resume_point
from hybridflow.checkpoint.store import CheckpointStore
from tests.unit.counting_run import NUM_STEPS, command, whole_run


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Folder of another run, with a line per step and checkpoints of steps 2, 4 and 6."""
    folder = tmp_path / "other"
    command(folder, run__total_steps="6")
    return folder


def stop_at(step: int) -> Callable[[int], None]:
    def hook(now: int) -> None:
        if now == step:
            raise KeyboardInterrupt

    return hook


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def lines_of(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_identity_and_its_checkpoints_carry_it(tmp_path: Path):
    folder = tmp_path / "run"
    command(folder, run__total_steps="4")
    record = read_record(folder)
    command(folder)
    assert record is not None and read_record(folder) == record
    assert {found.manifest.run for found in CheckpointStore(folder).scan() if found.manifest} == {record.run}
    assert not (folder / ASIDE).exists()


def test_a_path_counts_at_the_first_start_and_the_folders_own_newest_from_then_on(tmp_path: Path, other: Path):
    folder, settings = tmp_path / "run", {"checkpoint__resume": str(other / "checkpoints/step_000002")}
    seen: list[int] = []
    for stop in (4, 7):
        with pytest.raises(KeyboardInterrupt):
            command(folder, stop_at(stop), **settings)
    ended = command(folder, seen.append, **settings)
    assert seen == [7, 8] and ended.values == whole_run()[2:]
    seen.clear()
    command(folder, seen.append, **settings, run__total_steps="9")
    assert seen == [9]


def test_a_path_that_is_a_runs_folder_means_its_newest_checkpoint(tmp_path: Path, other: Path):
    assert command(tmp_path / "run", checkpoint__resume=str(other)).steps == [7, 8]
    assert command(tmp_path / "new", checkpoint__resume=str(other / "checkpoints")).steps == [7, 8]


def test_a_foreign_checkpoint_in_a_folder_with_steps_of_its_own_mixes_nothing(tmp_path: Path, other: Path):
    folder = tmp_path / "run"
    command(folder, run__total_steps="4")
    before = read_record(folder)
    ended = command(folder, checkpoint__resume=str(other / "checkpoints/step_000006"), checkpoint__keep="1")
    assert ended.steps == [7, 8] and names(folder) == ["step_000008"]
    (aside,) = (folder / ASIDE).iterdir()
    assert lines_of(aside) == [1, 2, 3, 4] and names(aside) == ["step_000002", "step_000004"]
    after = read_record(folder)
    assert before and after and before.run != after.run
    assert names(other) == ["step_000002", "step_000004", "step_000006"], "the other's folder is left as it is"


def test_a_start_that_is_refused_puts_nothing_aside(tmp_path: Path, other: Path):
    folder = tmp_path / "run"
    command(folder, run__total_steps="4")
    refused = command(folder, checkpoint__resume=str(other), model__path="another")
    assert "does not fit" in refused.message and refused.steps == [1, 2, 3, 4]
    assert not (folder / ASIDE).exists() and names(folder) == ["step_000002", "step_000004"]


def test_going_back_within_a_folder_keeps_what_came_after_aside(tmp_path: Path):
    folder = tmp_path / "run"
    command(folder)
    back = {"checkpoint__resume": str(folder / "checkpoints/step_000004")}
    with pytest.raises(KeyboardInterrupt):
        command(folder, stop_at(6), **back)
    assert names(folder) == ["step_000002", "step_000004"] and lines_of(folder) == [1, 2, 3, 4, 5]
    (aside,) = (folder / ASIDE).iterdir()
    assert names(aside) == ["step_000006", "step_000008"] and lines_of(aside) == list(range(1, NUM_STEPS + 1))
    assert command(folder, **back).values == whole_run()
    assert len(list((folder / ASIDE).iterdir())) == 1, "the second start with the same path does not go back again"


def test_never_begins_anew_and_keeps_the_earlier_run_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "run"
    command(folder, run__total_steps="4")
    with caplog.at_level(logging.INFO):
        ended = command(folder, checkpoint__resume="never", checkpoint__keep="1")
    assert ended.values == whole_run() and names(folder) == ["step_000008"]
    (aside,) = (folder / ASIDE).iterdir()
    assert names(aside) == ["step_000002", "step_000004"]
    assert any(str(aside) in record.getMessage() for record in caplog.records)


def test_whether_a_run_goes_on_in_its_folder_is_known_before_a_checkpoint_is_read(tmp_path: Path, other: Path):
    folder = tmp_path / "run"

    def goes_on(resume: str) -> bool:
        store = CheckpointStore(folder, resume=resume)
        source = resume_point(store).source
        assert goes_on_in_its_folder(store) is (source is not None and source.parent.resolve() == store.folder.resolve())
        return goes_on_in_its_folder(store)

    assert [goes_on(resume) for resume in ("auto", "never", str(other))] == [False, False, False]
    command(folder, checkpoint__resume=str(other))
    own = [str(folder), str(folder / "checkpoints"), str(folder / "checkpoints/step_000008")]
    assert [goes_on(resume) for resume in ("auto", str(other), *own)] == [True] * 5
    assert [goes_on(resume) for resume in ("never", str(other / "checkpoints/step_000002"))] == [False, False]


def test_checkpoints_copied_to_a_new_folder_are_taken_as_its_own(tmp_path: Path, other: Path):
    shutil.copytree(other / "checkpoints", tmp_path / "new/checkpoints")
    assert command(tmp_path / "new").steps == [7, 8]
    mine, theirs = read_record(tmp_path / "new"), read_record(other)
    assert mine and theirs and mine.run == theirs.run


def test_a_run_of_before_there_were_identities_continues(tmp_path: Path):
    folder = tmp_path / "run"
    command(folder, run__total_steps="4")
    for found in CheckpointStore(folder).scan():
        manifest = json.loads((found.path / "manifest.json").read_text())
        (found.path / "manifest.json").write_text(json.dumps({key: manifest[key] for key in ("format", "sequence", "files")}))
    (folder / RECORD).unlink()
    assert command(folder, checkpoint__keep="2").values == whole_run()
    assert names(folder) == ["step_000006", "step_000008"]


@pytest.mark.parametrize("now", ["sft", "ppo", "my.module:Own"])
def test_the_checkpoint_of_one_algorithm_is_refused_by_every_other(tmp_path: Path, now: str):
    folder = tmp_path / "run"
    command(folder, run__total_steps="4")
    refused = command(folder, algorithm=now)
    assert f"written by algorithm 'grpo', not '{now}'" in refused.message and refused.steps == [1, 2, 3, 4]


def test_a_resume_that_finds_fewer_lines_than_the_checkpoint_knows_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "run"
    command(folder, run__total_steps="6")
    (folder / "metrics.jsonl").write_text("")
    with caplog.at_level(logging.WARNING):
        command(folder)
    assert any("metrics.jsonl has 0 of the 6 lines" in record.getMessage() for record in caplog.records)


def test_everything_that_belongs_to_a_checkpoint_is_on_the_disk_before_it_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    flushed: list[str] = []
    real_flush, real_rename = __import__("os").fsync, Path.rename

    def fsync(descriptor: int) -> None:
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").resolve()))
        real_flush(descriptor)

    def rename(self: Path, target: Path) -> Path:
        if Path(target).name == "step_000002":
            wanted = {folder / name for name in ("metrics.jsonl", "samples.jsonl", "config.yaml", RECORD)} | {
                folder,
                folder.parent,
            }
            wanted |= {*self.rglob("*"), self}
            assert {str(path) for path in wanted} <= set(flushed)
            flushed.append("committed")
        return real_rename(self, target)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    assert command(folder, run__total_steps="2").steps == [1, 2]
    assert "committed" in flushed
