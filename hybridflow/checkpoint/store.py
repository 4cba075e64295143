"""The checkpoints of a run: `<run folder>/checkpoints/step_000007`, each complete or absent.

A checkpoint is written to a hidden temporary folder: a subfolder per role, `state.json` with what the controller
knows, and last `manifest.json` with size and checksum of every file. Everything is flushed to the disk before the
folder gets its name by one rename, so a kill at any moment leaves either the whole checkpoint or none.

Writing depends on the one folder that is written: whatever lies beside it, damaged, empty or of another run, is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hybridflow.checkpoint import advice
from hybridflow.checkpoint.lineage import read_record
from hybridflow.checkpoint.manifest import MANIFEST, Manifest, read_json, read_manifest, verify_files, write_manifest
from hybridflow.disk import errno_of, flush, free_bytes, named, remove, size_of, unused
from hybridflow.errors import CheckpointError, HybridflowError, WorkerDiedError, WorkerError

STATE = "state.json"
FOLDER = "checkpoints"
_COMPLETE = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What the controller needs to go on after `step`. It becomes JSON: keys are strings, tuples come back as lists."""

    step: int
    """The last finished step."""
    config: Mapping[str, object]
    """The resolved configuration, as nested dicts."""
    algorithm: Mapping[str, object] = field(default_factory=dict)
    """The algorithm's own state, for example an adaptive KL coefficient."""
    stream: Mapping[str, object] = field(default_factory=dict)
    """Which prompt groups were under way."""
    lines: Mapping[str, object] = field(default_factory=dict)
    """How many lines the files of the run's folder had that grow line by line."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A folder with a checkpoint's name and something in it."""

    path: Path
    step: int
    """By its name."""
    manifest: Manifest | None
    problem: str = ""
    """Why it has no manifest that can be read."""


class CheckpointStore:
    """Writes, finds, checks and retires the checkpoints of one run. One process writes at a time.

    The folder must be on a disk that all nodes of the run share: every rank writes its own part below it.
    """

    def __init__(self, run_folder: str | Path, *, keep: int = 0, resume: str = "auto"):
        self.run_folder = Path(run_folder).absolute()
        self.folder = self.run_folder / FOLDER
        self.keep = keep
        """Complete checkpoints that `prune` leaves, newest first; 0 keeps all."""
        self.resume = resume
        """`checkpoint.resume` of the run, for what is said of going on."""

    @property
    def run(self) -> str:
        """Identity of the run that has the folder; empty where it has none yet, and every checkpoint counts as its own."""
        record = read_record(self.run_folder)
        return record.run if record else ""

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; committed at the end of the block, abandoned when it raises.

        Older checkpoints are retired only after the new one is complete.

        Raises:
            CheckpointError: something could not be written; says how many bytes were free and which checkpoint remains.
        """
        temporary = self.begin(step)
        try:
            yield temporary
            self.commit(temporary)
        except WorkerDiedError:
            remove(temporary)
            raise
        except (OSError, HybridflowError) as error:
            if not self._is_of_the_disk(error):
                remove(temporary)
                raise
            raise self.abandon(temporary, error) from error
        except BaseException:
            remove(temporary)
            raise
        self.prune()

    def begin(self, step: int) -> Path:
        """A new empty folder for the checkpoint of `step`. What a killed run left unfinished is removed."""
        temporary = self.folder / f".step_{step:06d}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._recover()
            for leftover in [*self.folder.glob(".step_*.tmp*"), *self.folder.glob(".step_*.retired*")]:
                remove(leftover)
            temporary = unused(temporary)
            temporary.mkdir()
        except OSError as error:
            raise self._unwritten(f"no checkpoint can be written to {self.folder}: {error}", error, needed=0) from error
        return temporary

    def write_state(self, folder: Path, state: RunState) -> None:
        """Write what the controller knows to `folder`.

        Raises:
            CheckpointError: `state` holds something that JSON would lose; names its place.
        """
        plain = {name: _as_json(value, f"state.{name}") for name, value in vars(state).items()}
        path = folder / STATE
        try:
            path.write_text(json.dumps(plain, indent=1))
        except OSError as error:
            raise named(error, path) from error

    def commit(self, temporary: Path) -> Path:
        """Make the finished folder a checkpoint: checksums, flush, rename. Returns its final path.

        A checkpoint of the same step that a superseded start of this run left is replaced; anything else that has its name
        is put aside as `NAME.aside`.
        """
        final = self.folder / f"step_{_step_of(temporary):06d}"
        before = [found.manifest.sequence for found in self.own() if found.manifest]
        write_manifest(temporary, sequence=1 + max(before, default=0), run=self.run)
        is_own = any(found.path == final for found in self.own())
        replaced = unused(_replaced(final) if is_own else final.with_name(f"{final.name}.aside"))
        if final.exists() or final.is_symlink():
            final.rename(replaced)
        temporary.rename(final)
        flush(self.folder)
        if is_own:
            remove(replaced)
        return final

    def _is_of_the_disk(self, error: BaseException) -> bool:
        """Whether writing has failed, and not what was to be written."""
        cause = error.cause if isinstance(error, WorkerError) else f"{type(error).__name__}: "
        is_said = errno_of(error) is not None or cause.startswith(f"{CheckpointError.__name__}: ")
        return is_said or free_bytes(self.folder) < self._needed()

    def _needed(self) -> int:
        return max((size_of(found.path) for found in self.own()), default=0)

    def abandon(self, temporary: Path, cause: BaseException) -> CheckpointError:
        """Remove an unfinished checkpoint. Returns the error to raise: the cause, the free bytes, and what remains."""
        needed = self._needed()
        problem = f"the checkpoint of step {_step_of(temporary)} could not be written: {cause}"
        error = self._unwritten(problem, cause, needed=needed)
        remove(temporary)
        return error

    def _unwritten(self, problem: str, cause: BaseException, *, needed: int) -> CheckpointError:
        free, newest = free_bytes(self.folder), self._newest()
        own = sorted((found for found in self.own() if found.path != newest), key=_sequence)
        what_to_do = advice.after_failed_write(
            errno_of(cause), folder=self.folder, free=free, needed=needed, spare=[found.path for found in own]
        )
        kept = f"{newest} is complete and remains" if newest else "there is no earlier checkpoint"
        going_on = advice.to_continue(self.resume, newest)
        problem = f"{problem}\n{free:,} bytes were free in {self.folder}; {kept}."
        error = CheckpointError.advising(problem, f"{what_to_do} {going_on}")
        error.errno = errno_of(cause)
        return error

    def latest(self, *, run: str | None = None, instead: advice.Instead = advice.resume_from) -> Path | None:
        """The checkpoint of this run that was committed last, or None. `run` is an identity that the folder is yet to get.

        Raises:
            CheckpointError: a later one is damaged; `instead` says what to do about it.
        """
        self._recover()
        newest = self._newest(run)
        last_step = _step_of(newest) if newest else -1
        if damaged := [found for found in self.scan() if found.manifest is None and found.step > last_step]:
            found = damaged[-1]
            what_to_do = instead(found.path, newest_whole(self.folder, other_than=found.path))
            raise CheckpointError.advising(f"{found.problem}.", what_to_do)
        return newest

    @staticmethod
    def read_state(checkpoint: str | Path, *, instead: advice.Instead = advice.resume_from) -> RunState:
        """What the controller wrote into `checkpoint`.

        Raises:
            CheckpointError: the folder is no checkpoint, or its state is unreadable.
        """
        with _advised(Path(checkpoint), instead):
            return _state_of(Path(checkpoint))

    @staticmethod
    def verify(checkpoint: str | Path, *, instead: advice.Instead = advice.resume_from) -> None:
        """Compare every file of `checkpoint` with its manifest. Reads all of it, in several threads.

        Raises:
            CheckpointError: names the first file that is missing, added, has another size, or another checksum.
        """
        with _advised(Path(checkpoint), instead):
            verify_files(Path(checkpoint))

    def prune(self) -> list[Path]:
        """Remove all but the newest `keep` checkpoints of this run; returns what was removed. What else is there stays."""
        if self.keep == 0:
            return []
        retired = [found.path for found in sorted(self.own(), key=_sequence)[: -self.keep]]
        for path in retired:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
            remove(path.rename(unused(path.with_name(f".{path.name}.retired"))))
        return retired

    def scan(self) -> list[Found]:
        """Whatever is or was a checkpoint, of this run and others, in the order of the names."""
        return [_found(path) for path in self._complete()]

    def own(self, run: str | None = None) -> list[Found]:
        """The complete checkpoints of this run, in the order of their names. Their files are not read."""
        run = run or self.run
        return [found for found in self.scan() if found.manifest and (not run or found.manifest.run in ("", run))]

    def _complete(self) -> list[Path]:
        """All folders that are or were checkpoints; only complete ones get such a name."""
        return sorted(path for path in self.folder.glob("step_*") if _is_checkpoint(path))

    def _newest(self, run: str | None = None) -> Path | None:
        own = self.own(run)
        return max(own, key=_sequence).path if own else None

    def _recover(self) -> None:
        """Finish a replacement that a kill interrupted: between its two renames the old checkpoint is the only one."""
        for replaced in self.folder.glob(".step_*.replaced"):
            final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
            if final.exists():
                remove(replaced)
            else:
                replaced.rename(final)


def find(path: str | Path, *, instead: advice.Instead = advice.resume_from) -> Path:
    """The checkpoint that `path` means: itself, or the newest one where `path` is a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    if (given / MANIFEST).is_file() or (_COMPLETE.fullmatch(given.name) and _is_checkpoint(given)):
        return given
    run_folder = given.parent if given.name == FOLDER else given
    newest = CheckpointStore(run_folder).latest(instead=instead)
    if newest is None:
        found = "has no checkpoint in it" if given.is_dir() else "does not exist"
        example = "outputs/run/checkpoints/step_000100"
        raise CheckpointError(f"{given} {found}. Give a checkpoint, such as {example}, or the folder of a run")
    return newest


def newest_whole(folder: Path, *, other_than: Path) -> Path | None:
    """The newest checkpoint in `folder` that can be used: every file of it is read. None where there is none."""
    others = [found for found in CheckpointStore(folder.parent).own() if found.path.name != other_than.name]
    for found in sorted(others, key=_sequence, reverse=True) if folder.name == FOLDER else ():
        try:
            verify_files(found.path)
            _state_of(found.path)
        except CheckpointError:
            continue
        return found.path
    return None


@contextmanager
def _advised(checkpoint: Path, instead: advice.Instead) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        whole = newest_whole(checkpoint.absolute().parent, other_than=checkpoint)
        raise CheckpointError.advising(f"{error}.", instead(checkpoint, whole)) from error


def _state_of(checkpoint: Path) -> RunState:
    path = checkpoint / STATE
    content = read_json(path, "the controller's state")
    try:
        state = RunState(**cast(dict[str, Any], content))
    except TypeError as error:
        raise CheckpointError(f"{path} was written by another version of hybridflow: {error}") from error
    parts = (state.config, state.algorithm, state.stream, state.lines)
    if type(state.step) is not int or not all(isinstance(part, dict) for part in parts):
        raise CheckpointError(f"{path} should hold the number of a step and what the controller knew after it, and does not")
    if _COMPLETE.fullmatch(checkpoint.name) and state.step != _step_of(checkpoint):
        raise CheckpointError(f"{path} is of step {state.step}, and the folder has the name of step {_step_of(checkpoint)}")
    return state


def _found(path: Path) -> Found:
    try:
        return Found(path=path, step=_step_of(path), manifest=read_manifest(path))
    except CheckpointError as error:
        return Found(path=path, step=_step_of(path), manifest=None, problem=str(error))


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder with a checkpoint's name is or was one. An empty folder, a file, or a folder of other things
    never was."""
    if not _COMPLETE.fullmatch(path.name):
        return False
    try:
        return any((path / name).exists() for name in (MANIFEST, STATE)) or any(path.glob("*/.metadata"))
    except OSError:
        return True  # it may not be looked into


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint, or of a folder in which one is written."""
    found = re.match(r"\.?step_(\d+)", path.name)
    assert found, f"{path} has no checkpoint's name"
    return int(found[1])


def _sequence(found: Found) -> int:
    assert found.manifest is not None, "only complete checkpoints are in an order"
    return found.manifest.sequence


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _as_json(value: object, place: str) -> object:
    """`value` in plain dicts and lists. Refuses what JSON cannot hold or would change in silence, naming its place."""
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise CheckpointError(f"{place} has the key {odd[0]!r} of type {type(odd[0]).__name__}; state needs string keys")
        return {key: _as_json(item, f"{place}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    needed = "state is made of dicts, lists, strings and numbers (array.tolist() makes a list)"
    raise CheckpointError(f"{place} is a {type(value).__name__}, which JSON does not hold; {needed}")
