"""A disk that is full, or a limit on the size of files, at any write of a run: told with the file, and nothing is lost."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from hybridflow.batch import Batch
from hybridflow.controller.boundary import ended_by
from hybridflow.data.rollouts import write_rows
from hybridflow.trackers.base import Sample
from hybridflow.trackers.jsonl import LineFile
from tests.small_disk import small_disk_at
from tests.unit.counting_run import NUM_STEPS, command, config_of, whole_run


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """No file of this process grows beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def last_words(folder: Path, hook: object, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says of a failure; empty where it is done."""
    try:
        ended = command(folder, hook)  # type: ignore[arg-type]
    except OSError as error:
        with files_up_to(resource.RLIM_INFINITY):
            assert ended_by(error, config_of(folder, {})) == 1
        return capsys.readouterr().err
    return ended.message


@pytest.mark.parametrize("step", [1, 2, 3, NUM_STEPS])
@pytest.mark.parametrize("num_bytes", [0, 1, 30, 60, 100, 200, 300, 600, 1200])
def test_a_limit_on_the_size_of_files_is_told_with_the_file_and_loses_nothing(
    tmp_path: Path, step: int, num_bytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    limit = files_up_to(num_bytes)
    said = last_words(folder, lambda now: limit.__enter__() and None if now == step else None, capsys)
    with suppress(AttributeError):
        limit.__exit__(None, None, None)
    assert said, "the limit is below what a step or a checkpoint writes"
    assert str(folder) in said and "File too large" in said, said
    again = command(folder)
    assert not again.message and again.values == whole_run()


@pytest.mark.parametrize("step", [1, 2, 3, NUM_STEPS])
@pytest.mark.parametrize("num_pages", [0, 1, 2, 4])
def test_a_full_disk_is_told_with_the_file_and_loses_nothing(
    tmp_path: Path, step: int, num_pages: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk_at(tmp_path / "disk", mebibytes=1) as disk:
        folder, filling = disk / "run", disk / "filling"

        def hook(now: int) -> None:
            if now == step:
                with suppress(OSError), filling.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
                with filling.open("r+b") as file:
                    file.truncate(max(0, filling.stat().st_size - 4096 * num_pages))

        said = last_words(folder, hook, capsys)
        assert said, "a checkpoint takes more pages"
        assert str(folder) in said and "No space left on device" in said and "make room" in said.lower(), said
        filling.unlink()
        again = command(folder)
        assert not again.message and again.values == whole_run()


def test_a_line_that_did_not_fit_is_written_once_when_it_does(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "samples.jsonl")
    sample = vars(Sample(prompt="p" * 100, response="r", ground_truth="", reward=1.0))
    with files_up_to(60), pytest.raises(OSError, match=r"File too large.*samples\.jsonl"):
        file.append(sample)
    file.append(sample)
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [sample]


def test_rows_that_do_not_fit_are_told_with_the_file_and_leave_nothing(tmp_path: Path) -> None:
    rows = Batch({"reward": np.random.default_rng(0).random(4000)})
    target = tmp_path / "rollouts/3.parquet"
    with files_up_to(1000), pytest.raises(OSError, match=r"(?s)too large.*rollouts/") as raised:
        write_rows(rows, target)
    assert raised.value.filename
    assert not list(target.parent.iterdir())
    write_rows(rows, target)
    assert target.is_file()
