"""A batch of numbers as a file: NumPy's own format, without pickle."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from hybridflow.batch import Array, Batch, Ragged, ShardColumn
from hybridflow.errors import DamagedCheckpointError

OFFSETS = "offsets of "


def save_arrays(path: Path, batch: Batch) -> None:
    """Write every column: one number per row, or runs of numbers. Columns of objects are not for this."""
    arrays: dict[str, Array] = dict(batch.per_row)
    for name in batch.names:
        if name not in batch.per_row:
            column = batch.tokens(name)
            arrays |= {name: column.values, f"{OFFSETS}{name}": column.offsets}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def load_arrays(path: Path) -> Batch:
    """What `save_arrays` wrote.

    Raises:
        DamagedCheckpointError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    ragged = [name.removeprefix(OFFSETS) for name in arrays if name.startswith(OFFSETS)]
    columns: dict[str, Array | ShardColumn] = {
        name: Ragged(arrays.pop(name), arrays.pop(f"{OFFSETS}{name}")) for name in ragged
    }
    return Batch.from_columns({**arrays, **columns})
