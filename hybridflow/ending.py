"""How a command ends: whatever ended it becomes a few lines and an exit code, and its trace a file.

The export failed.
OSError: [Errno 28] No space left on device: ... [sharded.py:90]
The whole trace is in /tmp/hybridflow-4711-failure.txt

Commands that train nothing end here. Of a run `controller/boundary.py` says besides what was saved and how to go on.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from hybridflow import interrupts
from hybridflow.disk import NO_ROOM
from hybridflow.errors import ConfigError, FolderInUseError, HybridflowError, WorkerError

FAILED, MISCONFIGURED, BY_SIGNAL = 1, 2, 128
"""Exit codes; the number of the signal is added to the last."""
TRACE_FILE = "failure.txt"
"""In the run's folder: of its last failure."""
MAX_CHARACTERS = 1500
"""Of what is said of an error; all of it is in the file."""
WHILE = "while "
"""What the note of a phase begins with."""


def as_process(main: Callable[[], int]) -> NoReturn:
    """Run the command `main` as this process, and end it with its exit code, although threads may be stuck that Python would
    wait for."""
    open_closed_streams()
    code = main()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    if any(thread.name.startswith("hybridflow") for thread in threading.enumerate()):
        os._exit(code)  # such a thread may be in a call to Ray, which would abort the process
    sys.exit(code)


def open_closed_streams() -> None:
    """Have streams that were closed before the process began (`>&-`) lead nowhere, rather than into the first files that it
    opens."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            if (nowhere := os.open(os.devnull, os.O_RDWR)) != number:
                os.dup2(nowhere, number)
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def show(text: str) -> None:
    """Write a result to stdout. Where nobody reads it any more, as behind `| head -1`, the command ends as by SIGPIPE."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        raise SystemExit(BY_SIGNAL + signal.SIGPIPE) from None


@contextmanager
def phase(doing: str) -> Iterator[None]:
    """Have an error that leaves the block say what was being done: `with phase("saving the checkpoint of step 3"): ...`."""
    try:
        yield
    except BaseException as error:
        if not _phase_of(error):
            error.add_note(WHILE + doing)
        raise


def ended_command(what: str, action: Callable[[], int]) -> int:
    """The exit code of a command that trains nothing: that of `action`, or of what ended it, which is told on stderr. What this
    package itself has to say needs no more words; of any other error the trace is kept."""
    open_closed_streams()
    try:
        with interrupts.noticed():
            return action()
    except BaseException as raised:  # the one place where whatever ends such a command is told
        error = interrupts.failure() or raised
    if (number := interrupts.number()) is not None or isinstance(error, KeyboardInterrupt):
        say("\nStopped.\n")
        return BY_SIGNAL + (number or signal.SIGINT)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    if isinstance(error, HybridflowError) and not isinstance(error, WorkerError):
        say(f"{error}\n")
        return MISCONFIGURED if isinstance(error, ConfigError) else FAILED
    say(f"\n{what} failed.\n{what_happened(error)}\n{written_trace(error)}\n")
    return FAILED


def what_happened(error: BaseException) -> str:
    """The error as a user reads it, without the trace: where it was, and what was being done."""
    if isinstance(error, WorkerError):
        text = f"{error.place}: {without_trace(error.cause)}"
    elif isinstance(error, HybridflowError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {_described(error)}{_line_of(error)}"
    doing = _phase_of(error)
    cut = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} ... (the rest is in the file below)"
    return f"{cut} ({doing})" if doing and not isinstance(error, HybridflowError) else cut


def without_trace(text: str) -> str:
    """Of a formatted exception the type and the message; other texts as they are.

    Example: of a traceback that ends in `ValueError: no`, that line.
    """
    lines = text.strip("\n").splitlines()
    frames = [number for number, line in enumerate(lines) if re.match(r'\s+File ".*", line \d+', line)]
    if not frames:
        return "\n".join(lines)
    rest = lines[frames[-1] + 1 :]
    start = next((number for number, line in enumerate(rest) if line and not line[0].isspace()), len(rest) - 1)
    return "\n".join(line for line in rest[start:] if line.strip())


def written_trace(error: BaseException, folder: Path | None = None) -> str:
    """Write the whole trace, with those of ranks and the stacks that were taken, to a file, in `folder` where that can be;
    returns the line that names it."""
    header = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  process {os.getpid()}: {' '.join(sys.argv)}\n\n"
    text = header + "".join(traceback.format_exception(error))
    places = [folder / TRACE_FILE] if folder is not None and folder.is_dir() and not isinstance(error, FolderInUseError) else []
    for path in (*places, Path(tempfile.gettempdir(), f"hybridflow-{os.getpid()}-{TRACE_FILE}")):
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            with suppress(OSError):
                path.unlink()  # what did not fit
            continue
        return f"The whole trace is in {path}"
    return f"The trace could be written nowhere, so it follows.\n{text}"


def say(text: str) -> None:
    """To stderr, which may be a terminal that was closed or know less characters than the text has."""
    with suppress(OSError, ValueError):
        sys.stderr.write(text.encode(sys.stderr.encoding or "utf-8", "backslashreplace").decode(sys.stderr.encoding or "utf-8"))
        sys.stderr.flush()


def _described(error: BaseException) -> str:
    """The message; of the operating system also how much room there is, where that is the reason."""
    try:
        text = str(error).strip()
    except Exception as broken:
        return f"its text cannot be had ({type(broken).__name__})"
    if isinstance(error, OSError) and isinstance(error.filename, str) and error.errno in NO_ROOM:
        with suppress(OSError):
            folder = error.filename if os.path.isdir(error.filename) else os.path.dirname(error.filename) or "."
            text += f" ({shutil.disk_usage(folder).free:,} bytes are free there: make room)"
    return text


def _phase_of(error: BaseException) -> str:
    notes: list[str] = getattr(error, "__notes__", [])
    return next((note for note in notes if note.startswith(WHILE)), "")


def _line_of(error: BaseException) -> str:
    """File and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
