"""Write a checkpoint as a Hugging Face folder: `python -m hybridflow.export CHECKPOINT DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from hybridflow.ending import as_process, ended_command, show


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hybridflow.export", description="Write a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run for its newest one")
    parser.add_argument("folder", metavar="DIR", help="new folder to write to")
    parser.add_argument(
        "--role", default="actor", help="whose weights (default: actor); a critic gives backbone and value head"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="auto: as the model that training started from",
    )
    parser.add_argument("--source", metavar="MODEL", help="the model that training started from, if it was moved since")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with that model")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, and say where to; returns the exit code."""
    return ended_command("The export", partial(_exported, parse(arguments)))


def _exported(options: argparse.Namespace) -> int:
    # Imported here, so that --help does not wait for torch.
    from hybridflow.checkpoint.export import export_checkpoint

    folder = export_checkpoint(
        options.checkpoint,
        options.folder,
        role=options.role,
        dtype=options.dtype,
        source=options.source,
        trust_remote_code=options.trust_remote_code,
    )
    show(f"{folder}\n")
    return 0


if __name__ == "__main__":
    as_process(main)
