"""Write the quickstart's problems: sums such as `437+8=`, answered in the format of GSM8K.

    python examples/quickstart/make_data.py --folder DIR --seed 0

gives DIR/train.parquet and DIR/validation.parquet in the schema of docs/data.md. No problem is in both files.

The column `response` is read by supervised fine-tuning only. In the training file it is the homework of a careless pupil:
half of the answers are off by one, two or three. Who imitates it learns the format and roughly the sum; which answer is
right is left to be learned from rewards.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

DATA_SOURCE = "hybridflow/arithmetic"
FIRST, SECOND = range(1000), range(10)
NUM_VALIDATION = 1024
SLIP_PROBABILITY = 0.5
SLIPS = (-3, -2, -1, 1, 2, 3)


def make_row(first: int, second: int, *, slip: int = 0) -> dict[str, object]:
    """One problem as a row of the data files, for example `437+8=` with the response `#### 445`.

    `slip` is how far the response is off; the ground truth is always right.
    """
    answer = first + second
    return {
        "data_source": DATA_SOURCE,
        "prompt": f"{first}+{second}=",
        "response": f"#### {max(0, answer + slip)}",
        "reward_model": {"style": "rule", "ground_truth": str(answer)},
        "extra_info": {"first": first, "second": second},
    }


def make_problems(seed: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """Training and validation rows: all 10,000 sums in an order that depends on `seed`, cut in two."""
    draw = random.Random(seed)
    pairs = [(first, second) for first in FIRST for second in SECOND]
    draw.shuffle(pairs)
    validation = [make_row(first, second) for first, second in pairs[:NUM_VALIDATION]]
    train = [
        make_row(first, second, slip=draw.choice(SLIPS) if draw.random() < SLIP_PROBABILITY else 0)
        for first, second in pairs[NUM_VALIDATION:]
    ]
    return train, validation


def write_data(folder: Path, *, seed: int) -> tuple[Path, Path]:
    """Write both files into `folder`, which is created; returns the paths of training and validation file."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.parquet", folder / "validation.parquet"
    for path, rows in zip(paths, make_problems(seed), strict=True):
        pq.write_table(pa.Table.from_pylist(rows), path)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write arithmetic problems as parquet files.")
    parser.add_argument("--folder", type=Path, required=True, help="where the two files go")
    parser.add_argument("--seed", type=int, default=0, help="which problems are training and which validation")
    options = parser.parse_args(arguments)
    for path in write_data(options.folder, seed=options.seed):
        print(f"{path}: {pq.ParquetFile(path).metadata.num_rows} problems")


if __name__ == "__main__":
    main()
