"""Which run a folder belongs to: an identity in the folder (`run.json`) and in each of its checkpoints.

A run keeps its identity however often it is started again. What a folder holds of another run is put aside, never mixed
with the run's own and never removed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hybridflow.disk import flush, unused, write_durably

logger = logging.getLogger("hybridflow")

RECORD = "run.json"
ASIDE = "aside"
"""Folder within a run's folder for what belongs to other runs, or to steps that were superseded."""
GROWING = ("metrics.jsonl", "samples.jsonl")
"""Files of a run's folder that grow line by line."""
FILES = (*GROWING, "timeline.json", "run.json", "plan.json", "config.yaml", "lock")
FOLDERS = ("checkpoints", "aside", "rollouts", "tensorboard")
CONTENTS = (*GROWING, "timeline.json", "tensorboard", "rollouts", "wandb_run_id", "mlflow_run_id", "checkpoints")
"""What a run writes to its folder, by which the next start of another run there must not be led."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What run.json says."""

    run: str
    """The identity."""
    resumed_from: str | None = None
    """The path that `checkpoint.resume` named when the run first continued from there."""


def in_the_way(run_folder: Path) -> str | None:
    """What lies in a run's folder under the name of something else that the run will write there, at last when hours were
    trained; None where nothing does."""
    for name in (*FILES, *FOLDERS):
        path, is_file = run_folder / name, name in FILES
        if os.path.lexists(path) and not (path.is_file() if is_file else path.is_dir()):
            return f"{path} is no {'file' if is_file else 'folder'}, and the run is to write one of that name. Move it away"
    return None


def new_record(resumed_from: str | None = None) -> Record:
    """That of a run that begins now."""
    return Record(run=uuid.uuid4().hex, resumed_from=resumed_from)


def read_record(run_folder: Path) -> Record | None:
    """The record of a folder; None where no run has begun there, or it says nothing that can be read."""
    try:
        content = json.loads((run_folder / RECORD).read_text(encoding="utf-8"))
        return Record(**content) if isinstance(content["run"], str) and content["run"] else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write_record(run_folder: Path, record: Record) -> None:
    """Let the folder be that of a run."""
    write_durably(run_folder / RECORD, json.dumps(asdict(record), indent=1))


def put_aside(run_folder: Path, names: Sequence[str], *, why: str, copied: Sequence[str] = ()) -> Path | None:
    """Move what there is of `names`, paths within the folder, to a folder of their own below `aside`, and say so. `copied` are
    copied, as what goes on growing. Returns that folder; None where there was nothing."""
    present = [name for name in names if (run_folder / name).exists()]
    if not present:
        return None
    target = unused(run_folder / ASIDE / time.strftime("%Y%m%d-%H%M%S"))
    for name in present:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (run_folder / name).rename(target / name)
    for name in copied:
        if (run_folder / name).is_file():
            shutil.copy2(run_folder / name, target / name)
    flush(target)
    flush(run_folder)
    logger.info("%s: put aside in %s: %s", why, target, ", ".join(present))
    return target
