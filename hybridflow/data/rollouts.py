"""Answered rows as Parquet files to be looked at: `pandas.read_parquet("RUN/rollouts/12.parquet")`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.batch import Batch
from hybridflow.disk import named

TEXTS = ("prompt_text", "response_text", "data_source")
OBJECTS = ("ground_truth", "extra_info", "messages", "conversation")
"""Written as text: whatever is no text itself, as JSON."""
NOT_WRITTEN = ("position", "call", "pair")


def write_rows(batch: Batch, path: str | Path) -> None:
    """Write the texts and all numbers per row of a batch; the file is complete or absent.

    Raises:
        OSError: it could not be written; names it.
    """
    columns: dict[str, object] = {}
    for name in (*TEXTS, *OBJECTS):
        if name in batch.names and name not in batch.per_row:
            columns[name] = pa.array([_text(value) for value in batch.objects(name)], pa.large_string())
    columns |= {name: values for name, values in batch.per_row.items() if name not in NOT_WRITTEN}
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise named(error, target) from error
    temporary.rename(target)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, ensure_ascii=False, default=str)
