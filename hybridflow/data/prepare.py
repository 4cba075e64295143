"""Turning a dataset into the Parquet files that training reads: from a hub name, or from local files with one JSON per line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.ending import ended_command, show
from hybridflow.errors import DataError

Example = Mapping[str, object]
"""One example as the dataset has it."""
SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class PreparedRow:
    """One example as training reads it."""

    prompt: str | Sequence[Mapping[str, str]]
    """The question, or chat messages with role and content."""
    ground_truth: object
    """What the reward function compares with."""
    data_source: str
    """Chooses the rule where `reward.name` is by_data_source."""
    extra_info: Mapping[str, object] = field(default_factory=dict)
    """Whatever else the reward function wants to know."""
    response: str | None = None
    """A good answer, for supervised fine-tuning; all rows of a file have one, or none."""


Prepared = PreparedRow | Mapping[str, object]
"""A row, or one as the file is to have it: `messages` of a chat, or `prompt`, `chosen` and `rejected`."""
MapRow = Callable[[Example, str, int], Prepared | None]
"""(example, split, number within the split) -> row, or None to leave the example out."""


@dataclass(frozen=True, kw_only=True)
class HubName:
    """Where a dataset is on the Hugging Face hub."""

    name: str
    config: str | None = None


def run_from_command_line(map_row: MapRow, *, hub: HubName, arguments: Sequence[str] | None = None) -> None:
    """What a preparation script does: read its options, prepare every split, and say where the files are."""
    parser = argparse.ArgumentParser(description=f"Write {hub.name} as train.parquet and test.parquet.")
    parser.add_argument("--local_dir", type=Path, required=True, help="where the files go")
    parser.add_argument("--source", type=Path, help="folder with train and test as .jsonl, .json or .parquet")
    options = parser.parse_args(arguments)
    if code := ended_command("The preparation", partial(_prepared, map_row, hub, options)):
        sys.exit(code)


def _prepared(map_row: MapRow, hub: HubName, options: argparse.Namespace) -> int:
    for path, count in prepare(map_row, hub=hub, source=options.source, local_dir=options.local_dir).items():
        show(f"{path}: {count:,} rows\n")
    return 0


def prepare(map_row: MapRow, *, hub: HubName, source: Path | None, local_dir: Path) -> dict[Path, int]:
    """Write a file for each split that there is; returns their paths with the number of rows.

    Raises:
        DataError: the source cannot be read, or an example lacks a field that `map_row` asks for.
    """
    splits = _from_hub(hub) if source is None else _from_folder(source.expanduser())
    written = {}
    for split, examples in splits.items():
        path = local_dir.expanduser() / f"{split}.parquet"
        written[path] = write_parquet(map_rows(examples, map_row, split=split), path)
    return written


def map_rows(examples: Iterable[Example], map_row: MapRow, *, split: str) -> list[Prepared]:
    """The rows that `map_row` makes of the examples.

    Raises:
        DataError: an example lacks a field that it asks for.
    """
    rows = []
    for index, example in enumerate(examples):
        try:
            row = map_row(example, split, index)
        except KeyError as error:
            found = ", ".join(map(str, example)) or "none"
            raise DataError(f"{split}, example {index}: field {error} is missing; the example has {found}") from error
        except DataError as error:
            raise DataError(f"{split}, example {index}: {error}") from error
        if row is not None:
            rows.append(row)
    return rows


def write_parquet(rows: Sequence[Prepared], path: Path) -> int:
    """Write the rows in the schema of docs/data.md, and return how many; all of them are of one kind.

    Raises:
        DataError: there are none, their types differ, or only some have a response.
    """
    if not rows:
        raise DataError(f"{path}: there are no rows to write")
    prepared = [row for row in rows if isinstance(row, PreparedRow)]
    if prepared and len(prepared) < len(rows):
        raise DataError(f"{path}: {len(prepared)} of {len(rows)} rows are a PreparedRow; give one kind of row")
    plain = [row for row in rows if not isinstance(row, PreparedRow)]
    columns = _columns(prepared, path) if prepared else {name: [row.get(name) for row in plain] for name in plain[0]}
    try:
        table = pa.table(columns)
    except pa.ArrowException as error:
        raise DataError(f"{path}: the rows do not fit one schema: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return len(rows)


def _columns(rows: Sequence[PreparedRow], path: Path) -> dict[str, list[object]]:
    num_responses = sum(row.response is not None for row in rows)
    if num_responses not in (0, len(rows)):
        raise DataError(f"{path}: {num_responses} of {len(rows)} rows have a response; give one to all or to none")
    columns: dict[str, list[object]] = {
        "data_source": [row.data_source for row in rows],
        "prompt": [row.prompt if isinstance(row.prompt, str) else [dict(message) for message in row.prompt] for row in rows],
        "reward_model": [{"style": "rule", "ground_truth": row.ground_truth} for row in rows],
    }
    if num_responses:
        columns["response"] = [row.response for row in rows]
    if any(row.extra_info for row in rows):
        columns["extra_info"] = [dict(row.extra_info) for row in rows]
    return columns


def text_field(example: Example, name: str) -> str:
    """A field that must be a string.

    Raises:
        KeyError: it is missing.
        DataError: it is something else.
    """
    value = example[name]
    if not isinstance(value, str):
        raise DataError(f"field {name!r} is a {type(value).__name__} ({value!r:.80}); expected a string")
    return value


def _from_folder(folder: Path) -> dict[str, list[Example]]:
    paths = [folder / f"{split}{suffix}" for split in SPLITS for suffix in READERS]
    splits = {path.stem: READERS[path.suffix](path) for path in paths if path.is_file()}
    if not splits:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise DataError(f"--source {folder}: expected train or test as {', '.join(READERS)}; found {found or 'nothing'}")
    return splits


def _read_json(path: Path) -> list[Example]:
    """A list of examples, as LIMR and others are published."""
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON: {error}") from error
    if not isinstance(examples, list) or not all(isinstance(example, dict) for example in examples):
        raise DataError(f"{path}: expected a list of objects")
    return examples


def _read_parquet(path: Path) -> list[Example]:
    try:
        rows: list[Example] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is not a Parquet file that can be read: {error}") from error
    return rows


def _read_jsonl(path: Path) -> list[Example]:
    examples: list[Example] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                example = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: is not JSON: {error}") from error
            if not isinstance(example, dict):
                raise DataError(f"{path}:{number}: expected one object per line, found a {type(example).__name__}")
            examples.append(example)
    return examples


READERS: dict[str, Callable[[Path], list[Example]]] = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
"""By the end of a file's name."""


def _from_hub(hub: HubName) -> dict[str, Iterable[Example]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("reading from the hub needs the package datasets: pip install datasets; or give --source") from error
    try:
        found = datasets.load_dataset(hub.name, hub.config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"dataset {hub.name!r} does not load from the hub: {error}. Give --source for a local copy") from error
    return {split: found[split] for split in SPLITS if split in found}
