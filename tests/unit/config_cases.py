"""What the tests of the configuration share: a run that is right, and the mistakes of one that is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.config.load import load_config
from hybridflow.errors import ConfigError

LOOKS_LIKE_PARQUET = b"PAR1" * 3


def write_prompts(path: Path) -> None:
    """A file of one prompt, with the columns of prompts."""
    row = {"prompt": "1+1", "reward_model": {"ground_truth": "2"}, "data_source": "openai/gsm8k"}
    pq.write_table(pa.Table.from_pylist([row]), path)


CUTTING_ENGINE = "rollout.engine=hybridflow.rollout.torch_engine:TorchEngine"
"""One of a user's own: what it can do nobody knows."""


def right_run(folder: Path) -> list[str]:
    """Overrides that load on their own: a data file, a name from the hub, and no optional package."""
    file = folder / "train.parquet"
    write_prompts(file)
    return [
        f"data.train_files={file}",
        "model.path=org/name",
        "rollout.engine=torch",
        "trackers.names=console",
        "run.device=cpu",
    ]


def model_folder(folder: Path, *, context: int = 2048, heads: int = 14, without: str = "") -> Path:
    """A folder with the files of a saved model, or all but one."""
    folder.mkdir()
    sizes = {"max_position_embeddings": context, "num_attention_heads": heads}
    files = {"config.json": json.dumps(sizes), "model.safetensors": "", "tokenizer.json": ""}
    for name in files.keys() - {without}:
        (folder / name).write_text(files[name])
    return folder


def mistakes_of(overrides: Sequence[str], path: str | None = None) -> list[str]:
    """The mistakes that loading finds, as the user reads them; empty where it finds none."""
    try:
        load_config(path, overrides)
    except ConfigError as error:
        return [str(mistake) for mistake in error.errors]
    return []


def only_mistake(folder: Path, *overrides: str) -> str:
    """The one mistake that `overrides` make in a run that is right without them."""
    (found,) = mistakes_of([*right_run(folder), *overrides])
    return found.removeprefix("command line: ")
