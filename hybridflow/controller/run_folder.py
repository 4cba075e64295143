"""The folder of a run: made, tried, written, and this run's alone for as long as the run lasts."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hybridflow.checkpoint import advice
from hybridflow.checkpoint.lineage import in_the_way
from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.config.load import resolved_yaml
from hybridflow.config.schema import Config
from hybridflow.controller.cluster import is_in_copied_folder
from hybridflow.disk import UNSUPPORTED, flush, free_bytes, size_of, write_durably
from hybridflow.errors import ConfigError, FieldError, FolderInUseError, RunFolderError

logger = logging.getLogger("hybridflow")

LOCK = "lock"
"""A file that says which process has the folder. The operating system frees it when that ends, however it does."""
HEARTBEAT_S = 5.0
"""The owner renews the lock's time so often, for those whom the lock itself does not stop: on other nodes, or without locks."""


@dataclass(frozen=True)
class RunFolder:
    """A folder that this process has."""

    path: Path
    lock: TextIO
    owner: str
    """What this process wrote to the lock."""

    def check(self) -> None:
        """See that the path is still the folder that the run has begun in, and still this run's.

        Raises:
            RunFolderError: it was removed, moved, replaced, or taken by another run.
        """
        try:
            named, held = os.stat(self.path / LOCK), os.fstat(self.lock.fileno())
            owner = (self.path / LOCK).read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            gone = "is not there any more" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise RunFolderError(f"{self.path / LOCK} {gone}. {advice.folder_gone(self.path)}") from error
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino):
            found = f"run.folder={self.path} was removed or moved during the run, and another folder has its name"
            raise RunFolderError(f"{found}. {advice.folder_gone(self.path)}")
        if owner != self.owner:
            raise RunFolderError(f"run.folder={self.path} was taken by {_in_words(owner)}. {advice.folder_taken()}")


@contextmanager
def reserved(config: Config) -> Iterator[RunFolder]:
    """The run's folder, with the resolved configuration in it; until the block ends no other run can have it.

    Raises:
        ConfigError: it cannot be written, or would not stay.
        FolderInUseError: another run has it.
    """
    folder = Path(config.run.folder)
    if not folder.is_absolute() and is_in_copied_folder():
        found = f"found {folder}, which would lie in the copy of the working folder that Ray made for this job and deletes"
        raise ConfigError([FieldError("run.folder", f"{found}. Give an absolute path on a disk that all nodes share")])
    try:
        _make(folder)
        if problem := in_the_way(folder):
            raise ConfigError([FieldError("run.folder", problem)])
        lock = (folder / LOCK).open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unwritable(folder, error) from error
    ended = threading.Event()
    with lock:
        _take(lock, folder)
        try:
            owner = _sign(lock)
            _try_out(folder)
            write_durably(folder / "config.yaml", resolved_yaml(config))
            flush(folder / LOCK)
        except OSError as error:
            raise _unwritable(folder, error) from error
        _warn_of_little_room(config)
        threading.Thread(target=_beat, args=(lock, ended), daemon=True, name="heartbeat of the run's folder").start()
        try:
            yield RunFolder(folder, lock, owner)
        finally:
            ended.set()
            with suppress(OSError):
                lock.truncate(0)  # who comes next need not wait to see whether it still beats


def _make(folder: Path) -> None:
    """Make the folder, and put the entries of what was made on the disk."""
    made = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        flush(path.absolute().parent)


def _take(lock: TextIO, folder: Path) -> None:
    """Lock the folder. Where the file system has no locks, or they hold on one node only, the owner's heartbeat counts."""
    lock.seek(0)
    owner = lock.read()
    is_locked = True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, owner) from None
    except OSError as error:
        is_locked = False
        logger.warning(
            "run.folder=%s lies on a file system without locks (%s): another run there is noticed by its heartbeat alone",
            folder,
            error.strerror,
        )
    is_elsewhere = _host_of(owner) not in ("", socket.gethostname())
    if owner and (is_elsewhere or not is_locked) and _is_beating(lock, folder):
        raise _in_use(folder, owner)


def _is_beating(lock: TextIO, folder: Path) -> bool:
    """Whether the owner renews the lock's time while we watch. What was not renewed for long is not watched at all, by the
    clock of the file system, since those of two nodes may differ."""
    before = os.fstat(lock.fileno()).st_mtime_ns
    probe = folder / f".now.{uuid.uuid4().hex}"
    probe.touch()
    now = probe.stat().st_mtime_ns
    probe.unlink()
    if now - before > 6 * HEARTBEAT_S * 1e9:
        return False
    logger.info("run.folder=%s: waiting to see whether the run that had it last is still there", folder)
    deadline = time.monotonic() + 2.5 * HEARTBEAT_S
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 10)
        if os.stat(folder / LOCK).st_mtime_ns != before:
            return True
    return False


def _beat(lock: TextIO, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        with suppress(OSError, ValueError):  # the file is closed where the run has just ended; the rest `check` tells
            os.utime(lock.fileno())


def _sign(lock: TextIO) -> str:
    """Write to the lock who has it."""
    owner = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "start": uuid.uuid4().hex})
    lock.truncate(0)
    lock.write(owner)
    lock.flush()
    return owner


def _host_of(owner: str) -> str:
    try:
        return str(json.loads(owner)["host"])
    except (ValueError, KeyError, TypeError):
        return ""


def _in_words(owner: str) -> str:
    try:
        content = json.loads(owner)
        return f"process {content['process']} on {content['host']}"
    except (ValueError, KeyError, TypeError):
        return owner.strip() or "another process"


def _in_use(folder: Path, owner: str) -> FolderInUseError:
    return FolderInUseError(
        f"run.folder={folder} is in use by {_in_words(owner)}. End that run, or give this one another folder"
    )


def _try_out(folder: Path) -> None:
    """Do once what every checkpoint needs: a file, its flush, a rename of its folder, and the flush of the folder around it.

    Raises:
        OSError: one of them does not work there.
    """
    probe, renamed = folder / f".probe.{uuid.uuid4().hex}", folder / f".probed.{uuid.uuid4().hex}"
    try:
        probe.mkdir()
        (probe / "file").write_bytes(b"probe")
        flush(probe / "file")
        probe.rename(renamed)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            logger.warning(
                "run.folder=%s lies on a file system that cannot flush folders (%s): a power cut may undo the last checkpoint",
                folder,
                error.strerror,
            )
        finally:
            os.close(descriptor)
    finally:
        shutil.rmtree(probe, ignore_errors=True)
        shutil.rmtree(renamed, ignore_errors=True)


def _warn_of_little_room(config: Config) -> None:
    """Say that the next checkpoint will not fit, where the last one or the model's weights say how large it is at least."""
    if not config.checkpoint.every_steps and not config.checkpoint.save_last:
        return
    own = CheckpointStore(config.run.folder).own()
    weights = Path(config.model.path).glob("*.safetensors") if config.model.path and not config.model.lora_rank else ()
    needed = size_of(own[-1].path) if own else sum(path.stat().st_size for path in weights)
    if (free := free_bytes(Path(config.run.folder))) < needed:
        logger.warning(
            "run.folder=%s has %s free bytes, and a checkpoint takes at least %s: make room before the first is due",
            *(config.run.folder, f"{free:,}", f"{needed:,}"),
        )


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    where = f" ({error.filename})" if error.filename and Path(error.filename) != folder else ""
    return ConfigError([FieldError("run.folder", f"{folder} cannot be written{where}: {error.strerror}. Choose another")])
