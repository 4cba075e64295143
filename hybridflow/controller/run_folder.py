"""The folder of a run: made, written, and this run's alone."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from hybridflow.config.describe import resolved_yaml
from hybridflow.config.schema import Config
from hybridflow.controller.cluster import is_in_copied_folder
from hybridflow.errors import ConfigError, FieldError, FolderInUseError

LOCK = "lock"
"""A file that says which process has the folder. The operating system frees it when that ends, however it does."""


@contextmanager
def reserved(config: Config) -> Iterator[Path]:
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
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with lock:
        _take(lock, folder)
        try:
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
            (folder / "config.yaml").write_text(resolved_yaml(config))
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield folder


def _take(lock: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip() or "another process"
        raise FolderInUseError(
            f"run.folder={folder} is in use by {owner}. End that run, or give this one another folder"
        ) from None
    except OSError:
        return  # a file system without locks


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError([FieldError("run.folder", f"{folder} cannot be written: {error.strerror}. Choose another")])
