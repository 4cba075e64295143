"""Where a run goes on: `checkpoint.resume`, read together with what its folder holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybridflow.checkpoint import advice
from hybridflow.checkpoint.lineage import CONTENTS, GROWING, Record, new_record, put_aside, read_record, write_record
from hybridflow.checkpoint.store import CheckpointStore, Found, find, newest_whole
from hybridflow.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """What a run continues from, and what is to be done in its folder once it does."""

    source: Path | None
    """A whole checkpoint; None where the run begins."""
    settle: Callable[[], object]
    """Makes the folder this run's own: puts aside what it holds of others. To be called when the source has been read, so
    that a start that is refused changes nothing."""


def resume_point(store: CheckpointStore) -> ResumePoint:
    """The checkpoint that the run of `store` is to continue from.

    `auto` is the newest one of the run that has the folder. A path is that checkpoint, or the newest of that run's folder,
    at the first start; later starts with the same path continue from the newest one that the run has written since. `never`
    begins anew. What the folder holds of other runs, or of steps that are gone back on, is put aside, not removed.

    Raises:
        CheckpointError: there is none at that path, it is damaged, or the folder holds those of several runs.
    """
    record = read_record(store.run_folder)
    if store.resume == "never":
        return ResumePoint(
            source=None, settle=lambda: _begin(store, new_record(), "a new run begins (checkpoint.resume=never)")
        )
    if store.resume == "auto":
        return _going_on(store, record or _adopted(store))
    given = os.path.realpath(store.resume)
    if record and record.resumed_from == given:
        return _going_on(store, record, origin=Path(given))
    source = _whole(store, find(given))
    if source.resolve().parent == store.folder.resolve():
        return ResumePoint(source=source, settle=lambda: _go_back(store, record, source, given))
    why = f"another run begins here, from {source}"
    return ResumePoint(source=source, settle=lambda: _begin(store, new_record(given), why))


def goes_on_in_its_folder(store: CheckpointStore) -> bool:
    """Whether the run of `store` continues from a checkpoint in its own folder. Manifests are read, nothing is verified."""
    if store.resume == "never":
        return False
    given, folder = Path(os.path.realpath(store.resume)), store.folder.resolve()
    record = read_record(store.run_folder)
    is_later = store.resume == "auto" or (record is not None and record.resumed_from == str(given))
    return (is_later or folder in (given, given / folder.name, given.parent)) and bool(store.own())


def how_to_go_on(store: CheckpointStore, *, since_step: int | None = None) -> str:
    """What the same command would do, for a run that was stopped; what to do where it is of no use since a step."""
    record = read_record(store.run_folder)
    is_first = store.resume not in ("auto", "never") and (
        record is None or record.resumed_from != os.path.realpath(store.resume)
    )
    try:
        newest = None if is_first else store.latest()
    except CheckpointError as error:
        return str(error)
    if since_step is None:
        return advice.to_continue(store.resume, newest)
    sound = [found.path for found in store.own() if found.step < since_step] if newest else []
    return advice.before_it_was_spoilt(store.resume, since_step, newest, sound[-1] if sound else None)


def _begin(store: CheckpointStore, record: Record, why: str) -> None:
    store.run_folder.mkdir(parents=True, exist_ok=True)
    put_aside(store.run_folder, CONTENTS, why=why)
    write_record(store.run_folder, record)


def _going_on(store: CheckpointStore, record: Record, *, origin: Path | None = None) -> ResumePoint:
    """From the newest checkpoint of the run that has the folder; from `origin` where it has none."""
    foreign = [found for found in store.scan() if _run_of(found) not in ("", record.run)]
    spared = [found for found in foreign if origin and found.path.resolve() == origin]
    source = store.latest(run=record.run) or (find(origin) if origin else None)

    def settle() -> None:
        store.run_folder.mkdir(parents=True, exist_ok=True)
        _put_aside(store, [found for found in foreign if found not in spared], why="checkpoints of other runs")
        write_record(store.run_folder, record)

    return ResumePoint(source=_whole(store, source) if source else None, settle=settle)


def _adopted(store: CheckpointStore) -> Record:
    """For a folder without a record: the run that wrote the checkpoints in it.

    Raises:
        CheckpointError: several have.
    """
    identities = sorted({_run_of(found) for found in store.own()} - {""})
    if len(identities) > 1:
        whole = newest_whole(store.folder, other_than=store.folder)
        problem = f"{store.folder} has checkpoints of {len(identities)} runs, and no run.json says which of them it belongs to."
        raise CheckpointError.advising(problem, advice.among_several(whole))
    return Record(run=identities[0]) if identities else new_record()


def _go_back(store: CheckpointStore, record: Record | None, source: Path, given: str) -> None:
    """Let a checkpoint of the folder itself be its newest: what came after, is damaged or of another run is put aside."""
    before = record or new_record()
    (chosen,) = [found for found in store.scan() if found.path.name == source.name]
    assert chosen.manifest is not None, "it was verified"
    run, sequence = _run_of(chosen) or before.run, chosen.manifest.sequence
    kept = [
        found
        for found in store.scan()
        if found.manifest and _run_of(found) in ("", run) and found.manifest.sequence <= sequence
    ]
    _put_aside(store, [found for found in store.scan() if found not in kept], why=f"back to {source.name}", copied=GROWING)
    if record and run != record.run:
        put_aside(store.run_folder, [name for name in CONTENTS if name != store.folder.name], why="what another run measured")
    write_record(store.run_folder, Record(run=run, resumed_from=given))


def _whole(store: CheckpointStore, source: Path) -> Path:
    """`source`, when all of it has been read and is as it was written."""
    store.verify(source)
    store.read_state(source)
    return source


def _put_aside(store: CheckpointStore, gone: Sequence[Found], *, why: str, copied: Sequence[str] = ()) -> None:
    names = [str(found.path.relative_to(store.run_folder)) for found in gone]
    put_aside(store.run_folder, names, why=why, copied=copied)


def _run_of(found: Found) -> str:
    return found.manifest.run if found.manifest else ""
