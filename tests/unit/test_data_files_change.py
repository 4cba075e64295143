"""Data files that change while a run reads from them, or between a run and its resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hybridflow.config.schema import AlgorithmConfig, Config, DataConfig, ModelConfig
from hybridflow.data.chunks import ChunkReader
from hybridflow.errors import DataError
from hybridflow.workers.data import DataWorker
from tests.training_rows import context_of

NUM_ROWS = 5000
"""More than are read at once."""


def write(path: Path, *, first: int = 0, num_rows: int = NUM_ROWS) -> Path:
    rows = [f"{number:06d}+1=" for number in range(first, first + num_rows)]
    truths = [{"ground_truth": str(first + number + 1)} for number in range(num_rows)]
    columns = {"prompt": rows, "reward_model": truths, "data_source": ["openai/gsm8k"] * num_rows}
    pq.write_table(pa.table(columns), path, compression="none", row_group_size=1000)
    return path


def opened(model: str, *files: Path, validates: bool = True) -> DataWorker:
    config = Config(
        model=ModelConfig(path=model),
        data=DataConfig(
            train_files=tuple(map(str, files)), validation_files=(str(files[0]),) if validates else (), prompts_per_step=64
        ),
        algorithm=AlgorithmConfig(name="grpo"),
    )
    config = replace(config, validation=replace(config.validation, max_prompts=100))
    worker = DataWorker(config, context_of("data"))
    worker.open("prompts")
    return worker


def truncated(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1000)


def overwritten(path: Path) -> None:
    """In place: whoever has the file in memory by its pages reads other bytes."""
    path.write_bytes(bytes(path.stat().st_size))


def replaced(path: Path) -> None:
    write(path, first=700_000)


CHANGES: list[Callable[[Path], object]] = [Path.unlink, truncated, overwritten, replaced, Path.touch]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.parquet")


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_the_rows_that_it_has_read(
    tiny_model: str, file: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    undisturbed, worker = opened(tiny_model, file), opened(tiny_model, file)
    expected = [undisturbed.next_batch(step) for step in range(1, 4)]
    texts = [(batch.objects("prompt_text"), batch.objects("ground_truth")) for batch in expected]
    (tmp_path / "checkpoint").mkdir()
    change(file)
    for step, before, (prompts, truths) in zip(range(1, 4), expected, texts, strict=True):
        batch = worker.next_batch(step)
        assert batch.objects("prompt_text") == prompts and batch.objects("ground_truth") == truths
        assert np.array_equal(batch.tokens("prompt").values, before.tokens("prompt").values)
    assert len(worker.validation_batch()) == 100
    worker.save(str(tmp_path / "checkpoint"))


@pytest.mark.parametrize("change", [truncated, overwritten])
@pytest.mark.parametrize("after_chunks", [0, 1])
def test_a_file_that_changes_while_it_is_read_is_named(
    tiny_model: str, file: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], object], after_chunks: int
) -> None:
    original = ChunkReader.chunks

    def disturbed(self: ChunkReader, *arguments: Any, **options: Any) -> Iterator[object]:
        for number, chunk in enumerate(original(self, *arguments, **options)):
            yield chunk
            if number == after_chunks:
                change(file)

    monkeypatch.setattr(ChunkReader, "chunks", disturbed)
    with pytest.raises(DataError, match=r"rows\.parquet.*(cannot be read|changed while)"):
        opened(tiny_model, file, validates=False)


@pytest.mark.parametrize("change", [Path.unlink, truncated, overwritten, replaced])
def test_a_resume_with_other_content_is_refused_with_the_file(
    tiny_model: str, file: Path, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    other = write(tmp_path / "other.parquet", first=5000)
    (tmp_path / "checkpoint").mkdir()
    opened(tiny_model, other, file).save(str(tmp_path / "checkpoint"))
    change(file)
    with pytest.raises(DataError, match=r"data\.train_files: .*rows\.parquet"):
        opened(tiny_model, other, file).restore(str(tmp_path / "checkpoint"))


def test_a_resume_with_fewer_more_or_exchanged_files_is_refused(tiny_model: str, file: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.parquet", first=5000)
    (tmp_path / "checkpoint").mkdir()
    opened(tiny_model, other, file).save(str(tmp_path / "checkpoint"))
    for files in ([other], [file], [file, other], [other, file, file]):
        with pytest.raises(DataError, match=r"Give the files of then, in their order"):
            opened(tiny_model, *files).restore(str(tmp_path / "checkpoint"))


def test_the_same_content_under_another_name_and_time_goes_on(tiny_model: str, file: Path, tmp_path: Path) -> None:
    worker = opened(tiny_model, file)
    worker.next_batch(1)
    (tmp_path / "checkpoint").mkdir()
    worker.save(str(tmp_path / "checkpoint"))
    moved = Path(shutil.copyfile(file, tmp_path / "moved.parquet"))
    file.unlink()
    again = opened(tiny_model, moved)
    again.restore(str(tmp_path / "checkpoint"))
    assert again.next_batch(2).objects("prompt_text") == worker.next_batch(2).objects("prompt_text")
