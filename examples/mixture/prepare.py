"""Mix prepared files into one, so many rows of each; rules are chosen by `data_source`, as in each of them.

    python examples/mixture/prepare.py --files gsm8k/train.parquet math/train.parquet --rows 5000 2500 --output mixed.parquet

Columns that not all files have are left out; fields of `extra_info` are filled up. Without a file of its own a mixture is
`data.train_files` with `data.train_weights`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def mixed(paths: Sequence[Path], counts: Sequence[int | None], *, seed: int) -> pa.Table:
    """So many random rows of each file (None: all), in random order."""
    draw = np.random.default_rng(seed)
    tables = [pq.read_table(path) for path in paths]
    shared = [name for name in tables[0].column_names if all(name in table.column_names for table in tables)]
    parts = []
    for table, path, count in zip(tables, paths, counts, strict=True):
        if count is not None and count > table.num_rows:
            sys.exit(f"error: {path} has {table.num_rows} rows, asked for {count}")
        parts.append(table.select(shared).take(draw.permutation(table.num_rows)[:count]))
    whole = pa.Table.from_pylist([row for part in parts for row in part.to_pylist()])
    return whole.take(draw.permutation(whole.num_rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="prepared Parquet files")
    parser.add_argument("--rows", type=int, nargs="*", default=[], help="of each file; by default all")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.rows and len(options.rows) != len(options.files):
        parser.error(f"--rows: found {len(options.rows)} numbers for {len(options.files)} files")
    table = mixed(options.files, options.rows or [None] * len(options.files), seed=options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, options.output)
    print(f"{options.output}: {table.num_rows:,} rows")


if __name__ == "__main__":
    main()
