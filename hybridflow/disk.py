"""What is asked of a file system: flushes, renames and removals, with the file named and passing failures tried once more."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger("hybridflow")
T = TypeVar("T")

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR})
"""What a file system answers that cannot flush folders. Files are flushed all the same."""
PASSING = frozenset(
    {
        *(errno.EAGAIN, errno.EINTR, errno.EIO, errno.EREMOTEIO, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ECONNRESET, errno.ENOTCONN),
    }
)
"""Failures of a disk or of the network before it that may be over a moment later."""
RETRY_S = 1.0


def errno_of(error: BaseException) -> int | None:
    """The number of what the operating system refused, also where only its text has come from a rank; None where it is no
    such.

    Example:
        >>> errno_of(OSError(28, "No space left on device")), errno_of(RuntimeError("[Errno 28] No space left on device"))
        (28, 28)
    """
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\[Errno (\d+)\]", str(error))
    return int(found[1]) if found else None


def retried(path: Path, action: Callable[[], T]) -> T:
    """What `action` on `path` gives; after a passing failure it is done once more.

    Raises:
        OSError: it failed (again); the error names `path`.
    """
    try:
        return action()
    except OSError as error:
        if error.errno not in PASSING:
            raise named(error, path) from error
        logger.warning("%s: %s; trying once more", path, error.strerror)
    time.sleep(RETRY_S)
    try:
        return action()
    except OSError as error:
        raise named(error, path) from error


def unused(path: Path) -> Path:
    """`path`, or where that is taken the first of `path.1`, `path.2` and so on that is not."""
    candidates = (path if not number else path.with_name(f"{path.name}.{number}") for number in range(10_000))
    return next(candidate for candidate in candidates if not candidate.exists() and not candidate.is_symlink())


def named(error: OSError, path: Path) -> OSError:
    """`error` with the file that it is about, which failing writes and flushes do not say."""
    return error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))


def flush(path: Path) -> None:
    """Put the content of a file on the disk, or the entries of a folder: until then a power cut may undo a rename or a new
    file. A file system that cannot flush folders is left as it is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED or not path.is_dir():
            raise named(error, path) from error
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Replace the content of a file: after a power cut it has the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")

    def write() -> None:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)

    retried(path, write)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder. What cannot be removed stays, and the log says so."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s is of no use any more and could not be removed: %s", path, error)


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write at `folder`, or at the last folder on the way to it that exists."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
