"""verl's words for `hybridflow.export`: `python -m hybridflow.model_merger merge --local_dir STEP/actor --target_dir DIR`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from hybridflow import export
from hybridflow.ending import as_process

STEP = re.compile(r"(global_)?step_(\d+)")
WITHOUT_MEANING = (
    "--hf_model_path",
    "--tie-word-embedding",
    "--trust-remote-code",
    "--is-value-model",
    "--use_cpu_initialization",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the checkpoint, or the role, whose folder is given; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridflow.model_merger", description="Another name of hybridflow.export.")
    parser.add_argument("operation", choices=["merge"])
    parser.add_argument("--backend", choices=["fsdp"], default="fsdp")
    parser.add_argument("--local_dir", required=True, metavar="DIR", help="a checkpoint, its folder of a role, or a run")
    parser.add_argument("--target_dir", default="tmp", metavar="DIR", help="new folder to write to")
    for flag in WITHOUT_MEANING:
        parser.add_argument(flag, nargs="?", help="nothing: the checkpoint knows")
    options = parser.parse_args(arguments)
    checkpoint, role = split_role(Path(options.local_dir))
    return export.main([str(checkpoint), options.target_dir, "--role", role])


def split_role(folder: Path) -> tuple[Path, str]:
    """The checkpoint and the role that `folder` is of; verl's name of a checkpoint is ours of the same step.

    Example:
        >>> split_role(Path("run/checkpoints/step_000010/critic"))
        (PosixPath('run/checkpoints/step_000010'), 'critic')
        >>> split_role(Path("run/global_step_10/actor"))
        (PosixPath('run/checkpoints/step_000010'), 'actor')
    """
    is_role = STEP.fullmatch(folder.parent.name) is not None
    checkpoint, role = (folder.parent, folder.name) if is_role else (folder, "actor")
    if (match := STEP.fullmatch(checkpoint.name)) and match[1]:
        checkpoint = checkpoint.parent / "checkpoints" / f"step_{int(match[2]):06d}"
    return checkpoint, role


if __name__ == "__main__":
    as_process(main)
