"""The checkpoints of a run: `<run folder>/checkpoints/step_000007`, each complete or absent.

A checkpoint is written to a hidden temporary folder: a subfolder per role, `state.json` with what the controller
knows, and last `manifest.json` with size and checksum of every file. Everything is flushed to the disk before the
folder gets its name by one rename, so a kill at any moment leaves either the whole checkpoint or none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hybridflow.checkpoint.manifest import (
    MANIFEST,
    flush_folder,
    other_checkpoint,
    read_json,
    read_manifest,
    verify_files,
    write_manifest,
)
from hybridflow.errors import CheckpointError, HybridflowError, WorkerDiedError

STATE = "state.json"
_COMPLETE = re.compile(r"step_\d{6,}")


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


class CheckpointStore:
    """Writes, finds, checks and retires the checkpoints of one run. One process writes at a time.

    The folder must be on a disk that all nodes of the run share: every rank writes its own part below it.
    """

    def __init__(self, run_folder: str | Path, *, keep: int = 0):
        self.folder = Path(run_folder).absolute() / "checkpoints"
        self.keep = keep
        """Complete checkpoints that `prune` leaves, newest first; 0 keeps all."""

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
            self._discard(temporary)
            raise
        except (OSError, HybridflowError) as error:
            raise self.abandon(temporary, error) from error
        except BaseException:
            self._discard(temporary)
            raise
        self.prune()

    def begin(self, step: int) -> Path:
        """A new empty folder for the checkpoint of `step`. What a killed run left unfinished is removed."""
        temporary = self.folder / f".step_{step:06d}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._recover()
            for leftover in [*self.folder.glob(".step_*.tmp"), *self.folder.glob(".step_*.retired")]:
                shutil.rmtree(leftover)
            temporary.mkdir()
        except OSError as error:
            problem = f"no checkpoint can be written to {self.folder}: {error}"
            raise CheckpointError(f"{problem}. Make it writable, or choose another run.folder") from error
        return temporary

    def write_state(self, folder: Path, state: RunState) -> None:
        """Write what the controller knows to `folder`.

        Raises:
            CheckpointError: `state` holds something that JSON would lose; names its place.
        """
        plain = {name: _as_json(value, f"state.{name}") for name, value in vars(state).items()}
        (folder / STATE).write_text(json.dumps(plain, indent=1))

    def commit(self, temporary: Path) -> Path:
        """Make the finished folder a checkpoint: checksums, flush, rename. Returns its final path.

        A checkpoint of the same step that a superseded run left is replaced.
        """
        final = self.folder / temporary.name.removeprefix(".").removesuffix(".tmp")
        write_manifest(temporary, sequence=1 + max(map(_sequence, self._complete()), default=0))
        if final.exists():
            final.rename(self._replaced(final))
        temporary.rename(final)
        flush_folder(self.folder)
        shutil.rmtree(self._replaced(final), ignore_errors=True)
        return final

    def abandon(self, temporary: Path, cause: BaseException) -> CheckpointError:
        """Remove an unfinished checkpoint. Returns the error to raise: the cause, the free bytes, and what remains."""
        free = shutil.disk_usage(self.folder).free
        self._discard(temporary)
        remaining = self.latest()
        kept = f"{remaining} is complete and remains" if remaining else "there is no earlier checkpoint"
        step = int(temporary.name.removeprefix(".step_").removesuffix(".tmp"))
        return CheckpointError(
            f"the checkpoint of step {step} could not be written: {cause}\n{free:,} bytes were free in {self.folder}; {kept}. "
            "Make room (checkpoint.keep limits how many are kept), then start the same command again to continue from it"
        )

    def latest(self) -> Path | None:
        """The checkpoint that was committed last, or None.

        Raises:
            CheckpointError: a folder with a checkpoint's name has no readable manifest, so somebody else damaged or copied it.
        """
        self._recover()
        complete = self._complete()
        return max(complete, key=_sequence) if complete else None

    @staticmethod
    def read_state(checkpoint: str | Path) -> RunState:
        """What the controller wrote into `checkpoint`.

        Raises:
            CheckpointError: the folder is no checkpoint, or its state is unreadable.
        """
        path = Path(checkpoint) / STATE
        content = read_json(path, "the controller's state")
        try:
            return RunState(**cast(dict[str, Any], content))
        except TypeError as error:
            raise CheckpointError(
                f"{path} was written by another version of hybridflow: {error}. {other_checkpoint(path.parent)}"
            ) from error

    @staticmethod
    def verify(checkpoint: str | Path) -> None:
        """Compare every file of `checkpoint` with its manifest. Reads all of it, in several threads.

        Raises:
            CheckpointError: names the first file that is missing, has another size, or another checksum.
        """
        verify_files(Path(checkpoint))

    def prune(self) -> list[Path]:
        """Remove all but the newest `keep` checkpoints; returns what was removed."""
        if self.keep == 0:
            return []
        retired = sorted(self._complete(), key=_sequence)[: -self.keep]
        for path in retired:
            # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name.
            shutil.rmtree(path.rename(path.with_name(f".{path.name}.retired")))
        return retired

    def _complete(self) -> list[Path]:
        """All checkpoints; only complete ones have such a name."""
        return sorted(path for path in self.folder.glob("step_*") if _COMPLETE.fullmatch(path.name))

    def _discard(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    def _replaced(self, final: Path) -> Path:
        return final.with_name(f".{final.name}.replaced")

    def _recover(self) -> None:
        """Finish a replacement that a kill interrupted: between its two renames the old checkpoint is the only one."""
        for replaced in self.folder.glob(".step_*.replaced"):
            final = replaced.with_name(replaced.name.removeprefix(".").removesuffix(".replaced"))
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)


def find(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one where `path` is a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    given = Path(path)
    if (given / MANIFEST).is_file():
        return given
    run_folder = given.parent if given.name == "checkpoints" else given
    newest = CheckpointStore(run_folder).latest()
    if newest is None:
        found = "has no checkpoint in it" if given.is_dir() else "does not exist"
        example = "outputs/run/checkpoints/step_000100"
        raise CheckpointError(f"{given} {found}. Give a checkpoint, such as {example}, or the folder of a run")
    return newest


def _sequence(checkpoint: Path) -> int:
    return read_manifest(checkpoint).sequence


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
