"""Parquet files: which columns are expected, what to say where they differ, and columns kept as Arrow stores them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.config.rules_files import parquet_advice
from hybridflow.data.formats import IMAGES, PICTURES, advice
from hybridflow.errors import DataError
from hybridflow.registry import nearest

logger = logging.getLogger(__name__)

ROWS_PER_READ = 2048


@dataclass(frozen=True, kw_only=True)
class ColumnSpec:
    """A column that a file should have."""

    name: str
    expected: str
    """Its type in words, for messages."""
    fits: Callable[[pa.DataType], bool]
    is_required: bool = True
    field: str | None = None
    """The one field of a struct column that is read."""

    @property
    def path(self) -> str:
        return f"{self.name}.{self.field}" if self.field else self.name


def identity_of(path: str) -> dict[str, int | str]:
    """What tells the content of a Parquet file from that of another: its size, and a hash of its footer, which has the
    place, the size and the extremes of every column chunk. Neither its name nor its time counts.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with Path(path).expanduser().open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 8))
            length = int.from_bytes(file.read(4), "little")
            file.seek(max(0, size - 8 - length))
            return {"bytes": size, "footer": hashlib.blake2b(file.read(), digest_size=16).hexdigest()}
    except OSError as error:
        raise DataError(f"data.train_files: {path}: cannot be read: {error.strerror}") from error


def num_rows(path: str) -> int:
    """Rows of a file, from its footer.

    Raises:
        OSError, ValueError: it cannot be read, or is no Parquet file.
    """
    return int(pq.read_metadata(path).num_rows)


def is_text(kind: pa.DataType) -> bool:
    """Whether values of the type read as strings."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_integer(kind: pa.DataType) -> bool:
    """Whether values of the type are whole numbers."""
    return bool(pa.types.is_integer(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether values of the type are numbers."""
    return is_integer(kind) or bool(pa.types.is_floating(kind))


def is_messages(kind: pa.DataType) -> bool:
    """Whether values of the type are lists of {role, content}."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    return has_fields(kind.value_type, "role", "content") and all(
        is_text(kind.value_type[name].type) for name in ("role", "content")
    )


def has_fields(kind: pa.DataType, *names: str) -> bool:
    """Whether the type is a struct with these fields."""
    return bool(pa.types.is_struct(kind)) and all(kind.get_field_index(name) >= 0 for name in names)


def open_parquet(path: str, specs: Sequence[ColumnSpec], *, key: str) -> pq.ParquetFile:
    """The opened file; columns are checked, rows not read.

    `key` is the configuration key that names the file, for messages.

    Raises:
        DataError: no such file, not Parquet, or a column is missing or has another type.
    """
    where = f"{key}: {path}"
    resolved = Path(path).expanduser()
    if not resolved.exists():
        siblings = [entry.name for entry in resolved.parent.iterdir()] if resolved.parent.is_dir() else []
        raise DataError(f"{where}: there is no such file{nearest(resolved.name, siblings)}")
    if resolved.is_dir():
        raise DataError(f"{where}: is a folder; name its Parquet files one by one")
    if not resolved.is_file():  # a pipe, from which nothing may ever come
        raise DataError(f"{where}: is no ordinary file, so it cannot be read from its end as Parquet is. Write it to one")
    try:
        file = pq.ParquetFile(resolved)  # not mapped into memory: a file that is cut short then ends the process by a signal
    except (pa.ArrowException, OSError) as error:
        said = f"{where}: is not a Parquet file that can be read ({error!s:.200})"
        raise DataError(f"{said}. {parquet_advice(path)}") from error
    problems = [problem for spec in specs if (problem := _problem(spec, file.schema_arrow))]
    if problems:
        found = ", ".join(f"{column.name} ({column.type})" for column in file.schema_arrow) or "no columns"
        form = advice(file.schema_arrow.names)
        do = f"{form}. docs/data.md shows how to write one" if form else "docs/data.md shows how to write one"
        raise DataError(f"{where}: {'; '.join(problems)}. The file has: {found}. {do}")
    return file


def has_column(path: str, name: str, *, key: str) -> bool:
    """Whether the file has a column of that name. Raises as `open_parquet`."""
    return name in open_parquet(path, (), key=key).schema_arrow.names


def _problem(spec: ColumnSpec, schema: pa.Schema) -> str | None:
    index = schema.get_field_index(spec.name)
    if schema.names.count(spec.name) > 1:
        return f"column {spec.name!r} is there {schema.names.count(spec.name)} times"
    if index < 0:
        if not spec.is_required:
            return None
        return f"column {spec.name!r} is missing{nearest(spec.name, schema.names) or '.'} Expected {spec.expected}"
    kind = schema.field(index).type
    if spec.fits(kind) or (not spec.is_required and pa.types.is_null(kind)):
        return None
    return f"column {spec.name!r} is {kind}; expected {spec.expected}"


def warn_of_unread(file: pq.ParquetFile, specs: Sequence[ColumnSpec], *, where: str) -> None:
    """Log the columns that the file has and nobody reads."""
    known = {spec.name for spec in specs}
    if unread := [name for name in file.schema_arrow.names if name not in known]:
        hints = [advice(file.schema_arrow.names), PICTURES if has_pictures(file) else ""]
        logger.warning("%s: columns that are not read: %s", where, "; ".join([", ".join(unread), *filter(None, hints)]))


def has_pictures(file: pq.ParquetFile) -> bool:
    """Whether a column of images holds any, by the file's footer. Nulls alone are INT32 without statistics."""
    groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    found = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == IMAGES and chunk.physical_type != "INT32"]
    return any(chunk.statistics is None or chunk.statistics.num_values > 0 for chunk in found)


def read_batches(file: pq.ParquetFile, specs: Sequence[ColumnSpec], *, where: str) -> Iterator[pa.RecordBatch]:
    """The file's rows, some thousand at a time, with only those of the columns that it has. `where` names it in messages.

    Raises:
        DataError: a part of the file is damaged.
    """
    names = set(file.schema_arrow.names)
    columns = [spec.path for spec in specs if spec.name in names]
    try:
        yield from file.iter_batches(batch_size=ROWS_PER_READ, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: its rows cannot be read ({error}). Was it damaged since it was written?") from error


def values_of(path: str, spec: ColumnSpec, *, key: str) -> Iterator[object]:
    """One column of a file, where it has it. Raises as `open_parquet` and `read_batches`."""
    for batch in read_batches(open_parquet(path, (), key=key), [spec], where=f"{key}: {path}"):
        if batch.num_columns:
            yield from batch.column(0).to_pylist()


def without_nulls(value: object) -> object:
    """The value without the null fields of structs, at every depth: Arrow gives each row the fields of all rows of its column.

    Example:
        >>> without_nulls([{"arguments": {"city": "Bern", "amount": None}}])
        [{'arguments': {'city': 'Bern'}}]
    """
    match value:
        case dict():
            return {name: without_nulls(element) for name, element in value.items() if element is not None}
        case list():
            return [without_nulls(element) for element in value]
        case _:
            return value


class StoredColumn:
    """A column as Arrow arrays, which take a fraction of the memory of Python objects; parts may differ in type."""

    def __init__(self, parts: Sequence[pa.Array]):
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def take(self, rows: npt.NDArray[np.int64]) -> list[object]:
        """The values at `rows`, as Python objects, without the null fields of structs."""
        values: list[object] = [None] * len(rows)
        home = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(home):
            where = np.flatnonzero(home == part)
            found = self._parts[part].take(pa.array(rows[where] - self._starts[part])).to_pylist()
            for position, value in zip(where, found, strict=True):
                values[position] = without_nulls(value)
        return values

    def take_field(self, field: str, rows: npt.NDArray[np.int64]) -> list[object]:
        """Likewise, of a struct column: one of its fields."""
        return [value.get(field) if isinstance(value, dict) else None for value in self.take(rows)]
