"""The time of day decides nothing: it may be set back during a run, and several runs may begin in one second."""

from __future__ import annotations

import ast
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.architecture.limits import sources
from tests.unit.counting_run import NUM_STEPS, command, whole_run
from tests.unit.test_lineage import stop_at

FOR_PEOPLE = {
    "hybridflow/trackers/jsonl.py",  # the time of each line, and of a file that is put aside
    "hybridflow/trackers/mlflow.py",
    "hybridflow/checkpoint/lineage.py",  # the name of a folder of what is put aside
    "hybridflow/ending.py",  # the head of a trace
    "hybridflow/config/load.py",  # `${now:...}` in the name of a run's folder
    "hybridflow/controller/rank_process.py",  # when a call began, for timeline.json
    "hybridflow/environments/sessions.py",  # `created` of OpenAI's answers
}
OF_DAY = {"time", "time_ns", "strftime", "localtime", "gmtime", "now", "utcnow", "today"}


def test_nothing_is_measured_by_the_time_of_day() -> None:
    """Waits, limits and durations go by clocks that nobody sets."""
    found = {
        source.path
        for source in sources("hybridflow")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr in OF_DAY and isinstance(node.value, ast.Name)
        if node.value.id in ("time", "datetime", "date")
    }
    assert found <= FOR_PEOPLE


@pytest.mark.parametrize("jump_s", [-86400.0, -3.0, 1e9])
def test_a_clock_that_is_set_during_a_run_changes_no_step(
    tmp_path: Path, jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def hook(step: int) -> None:
        offset[0] += jump_s * (step % 2)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        command(tmp_path / "run", hook)
    ended = command(tmp_path / "run")
    assert not ended.message and ended.values == whole_run()


@pytest.mark.parametrize("seed", range(6))
def test_files_of_any_age_are_gone_on_from_as_they_were_written(tmp_path: Path, seed: int) -> None:
    folder, chance = tmp_path / "run", random.Random(seed)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        command(folder, stop_at(6))
    for path in [folder, *folder.rglob("*")]:  # as a copy, a restore or a clock that was wrong leaves them
        moment = chance.choice([0, 1e9, time.time() - 60, time.time() + 86400, 4e9])
        os.utime(path, (moment, moment))
    ended = command(folder, seen.append)
    assert not ended.message and ended.values == whole_run()
    assert seen[0] == 5, "after the newest checkpoint"


def test_runs_that_begin_anew_in_one_folder_within_a_second_keep_each_others_history(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(4):
        command(folder, checkpoint__resume="never")
    kept = [path for path in folder.rglob("metrics*.jsonl") if path.read_text().count("\n") == NUM_STEPS]
    assert len(kept) == 4


COMMAND = """
import sys, time
from pathlib import Path
from tests.unit import counting_run
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    pass
ended = counting_run.command(Path(sys.argv[1]), lambda step: time.sleep(0.1))
sys.exit(ended.message or 0)
"""


def begun_together(folders: list[Path], start: Path) -> list[tuple[int, str]]:
    """Exit code and words of a run on each folder, all begun when `start` is there."""
    commands = [[sys.executable, "-c", COMMAND, str(folder), str(start)] for folder in folders]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    start.touch()
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


def test_of_runs_that_begin_at_once_on_one_folder_one_goes_on_and_the_others_are_told_who_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = begun_together([folder] * 3, tmp_path / "start")
    assert sorted(code for code, _ in ended) == [0, 1, 1]
    assert all("is in use by" in said for code, said in ended if code)
    assert command(folder).values == whole_run()
    shutil.rmtree(folder)


def test_runs_that_begin_at_once_on_folders_of_their_own_know_nothing_of_each_other(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    assert [code for code, _ in begun_together(folders, tmp_path / "start")] == [0, 0, 0]
    assert all(command(folder).values == whole_run() for folder in folders)
    identities = {(folder / "run.json").read_text() for folder in folders}
    assert len(identities) == 3
