"""The outer boundary: whatever ends a run becomes a few lines and an exit code, and its trace a file.

The run failed.
actor.update failed on rank 1 (node n2 10.0.0.2): ValueError: ...        what happened, in which role, where
The same command continues after outputs/run/checkpoints/step_000040.    what was saved, how to go on
The whole trace is in outputs/run/failure.txt
"""

from __future__ import annotations

import signal
from pathlib import Path

from hybridflow import interrupts
from hybridflow.checkpoint.advice import once_put_right
from hybridflow.config.schema import Config
from hybridflow.ending import BY_SIGNAL, FAILED, MISCONFIGURED, say, what_happened, written_trace
from hybridflow.errors import CallTimeoutError, ConfigError, HybridflowError, PlacementError, WorkerDiedError


def ended_by(error: BaseException, config: Config | None) -> int:
    """Say on stderr what ended the run, or before it has begun the command, where `config` is None; returns the exit code."""
    number = interrupts.number() if config is not None else None
    if number is None and config is not None and not isinstance(error, HybridflowError):
        error = interrupts.failure() or error  # in a call to Ray, what is raised from a signal's handler loses its type
    if isinstance(error, ConfigError):
        say(f"{error}\n")
        return MISCONFIGURED
    if number is not None or isinstance(error, KeyboardInterrupt):
        say(f"\nStopped. {how_to_go_on(config)}\n" if config is not None else "\nStopped.\n")
        return BY_SIGNAL + (number or signal.SIGINT)
    if isinstance(error, SystemExit) and config is None:
        return error.code if isinstance(error.code, int) else FAILED
    say("\nThe run failed.\n" if config is not None else "\nThe command failed before anything was started.\n")
    known = error.advice if isinstance(error, HybridflowError) else ""
    lines = [what_happened(error).removesuffix(known).rstrip()]
    lines += [known or _how_to_go_on_after(error, config)] if config is not None else []
    say("\n".join([*lines, written_trace(error, Path(config.run.folder).absolute() if config is not None else None), ""]))
    return FAILED


def how_to_go_on(config: Config, *, since_step: int | None = None) -> str:
    """What was saved, and what the same command would do after a run was stopped."""
    from hybridflow.checkpoint.resume import how_to_go_on
    from hybridflow.checkpoint.store import CheckpointStore

    try:
        return how_to_go_on(CheckpointStore(config.run.folder, resume=config.checkpoint.resume), since_step=since_step)
    except (HybridflowError, OSError) as error:
        return f"What was saved cannot be told: {error}"


def _how_to_go_on_after(error: BaseException, config: Config) -> str:
    """Of what may pass by itself the command is simply given again; of other failures the cause comes first."""
    if not isinstance(error, HybridflowError) or isinstance(error, WorkerDiedError | CallTimeoutError | PlacementError):
        return how_to_go_on(config)
    return once_put_right(how_to_go_on(config, since_step=error.since_step))
