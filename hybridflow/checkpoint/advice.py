"""What to do when something is wrong with a checkpoint, the disk or a resume: derived from what is found, never a fixed text.

Every sentence of the package that tells how to go on is made here, with the settings to give at its end; a test does what
each of them says and requires that the run gets further (tests/unit/test_advice.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hybridflow.disk import NO_ROOM, NOT_ALLOWED, PASSING

Instead = Callable[[Path, Path | None], str]
"""What to do in place of using a damaged checkpoint, given the newest whole one beside it, if any."""


def resume_from(damaged: Path, whole: Path | None) -> str:
    """For a run that was to continue from `damaged`."""
    if whole is not None:
        return f"The newest whole checkpoint beside it is {whole}: to go on from there, checkpoint.resume={whole}"
    return f"No other checkpoint in {damaged.parent} is whole; to put it aside and start anew, checkpoint.resume=never"


def export_from(damaged: Path, whole: Path | None) -> str:
    """For an export of `damaged`."""
    if whole is not None:
        return f"The newest whole checkpoint beside it is {whole}: export that"
    return f"No other checkpoint in {damaged.parent} is whole, so there is nothing to export"


def to_continue(resume: str, newest: Path | None) -> str:
    """What the same command would do after a run has ended early. `resume` is `checkpoint.resume` of that command, `newest` the
    newest checkpoint of the run itself."""
    if newest is None:
        from_path = f" from {resume}" if resume not in ("auto", "never") else ""
        return f"There is no checkpoint yet: the same command starts anew{from_path}."
    if resume == "never":
        return f"The same command would start anew; to continue after {newest}, checkpoint.resume=auto"
    return f"The same command continues after {newest}."


def after_failed_write(number: int | None, *, folder: Path, free: int, needed: int, spare: Sequence[Path]) -> str:
    """What is in the way of a checkpoint, by the error's number, `free` bytes of the `needed` ones, and older checkpoints
    of the run that nothing needs."""
    if number in NO_ROOM or (number is None and free < needed):
        room = f"Make room at {folder}: {needed:,} bytes were needed" if needed > free else f"Make room at {folder}, or a quota"
        names = " and ".join(path.name for path in spare)
        return f"{room}.{f' Older checkpoints of this run may be removed: {names}.' if names else ''}"
    if number in NOT_ALLOWED:
        return f"This user may not write at {folder} (any more): correct its permissions, or mount it writable."
    if number in PASSING:
        return "The disk, or the network before it, failed twice, which room does not help: see that it works."
    return f"Room was not short. See what is wrong at {folder}, or choose another run.folder."


def after_failed_export(number: int | None, *, folder: Path) -> str:
    """What is in the way of an export to a folder below `folder`, by the error's number."""
    if number in NO_ROOM:
        return f"Make room at {folder}, or export elsewhere"
    if number in NOT_ALLOWED:
        return f"This user may not write at {folder}: correct its permissions, or export elsewhere"
    if number in PASSING:
        return "The disk, or the network before it, failed: see that it works, or export elsewhere"
    return "Export elsewhere"


def for_misfit(changed: Sequence[str]) -> str:
    """Where a whole checkpoint does not fit the run. `changed` has a line `key: value then, value now` for each setting of
    model and data that is another."""
    if not changed:
        same = "The settings of model and data are those of the checkpoint, so files that they name have changed since"
        return f"{same}: give it the files of then. To begin anew, checkpoint.resume=never"
    lines = "\n".join(f"  {line}" for line in changed)
    return f"These settings differ from those of the checkpoint. To continue from it, set them back:\n{lines}"


def other_algorithm(then: str, now: str) -> str:
    """Where a checkpoint of one algorithm is to be continued by another."""
    return (
        f"To continue it, algorithm={then}. To train its weights by {now!r}, export them (python -m hybridflow.export) and "
        "give that folder as model.path in a run.folder of its own"
    )


def other_policy(changed: Sequence[str]) -> str:
    """Where the settings of adapters differ. `changed` is as of `for_misfit`."""
    lines = "\n".join(f"  {line}" for line in changed)
    merges = "" if any(line.startswith("model.lora_rank: 0 ") for line in changed) else ", which merges its adapters,"
    return (
        f"To continue from it, set them back; or export it (python -m hybridflow.export){merges} and give that folder as "
        f"model.path in a run.folder of its own:\n{lines}"
    )


def before_it_was_spoilt(resume: str, since_step: int, newest: Path | None, sound: Path | None) -> str:
    """Where what was trained since a step is of no use. `newest` is the newest checkpoint of the run, `sound` the newest one of
    before that step."""
    if newest == sound:
        return to_continue(resume, newest)
    if sound is None:
        return f"What was saved since step {since_step} is of no use; to put it aside and start anew, checkpoint.resume=never"
    return f"What was saved since step {since_step} is of no use; to go on from before, checkpoint.resume={sound}"


def once_put_right(going_on: str) -> str:
    """How to go on after a failure that would come again. `going_on` is as of `to_continue`."""
    return f"When that is put right: {going_on[:1].lower()}{going_on[1:]}"


def folder_gone(folder: Path) -> str:
    """Where the folder of a run has gone during the run."""
    return f"If {folder} was moved, move it back before you start again"


def folder_taken() -> str:
    """Where another run has taken the folder of this one."""
    return "Let that one have it, and give this one another run.folder"


def among_several(whole: Path | None) -> str:
    """Where a folder holds checkpoints of several runs, and nothing says which is the folder's own; `whole` is one of them."""
    if whole is None:
        return "None of them is whole; to put them aside and start anew, checkpoint.resume=never"
    return f"Say which to go on from, and those of other runs are put aside; for example checkpoint.resume={whole}"
