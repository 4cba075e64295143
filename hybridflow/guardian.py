"""One process group per process that runs code of a user, all of which ends with it, whatever that code has started.

Such a process, of a reward function or of an environment, forks before it imports anything: the fork works, and the guardian
that stays ends it and all that comes of it, when it ends, at SIGTERM, or when its parent has gone. On Linux also what has left
the group, as `start_new_session=True` does. What the code prints passes through here, at most so much of it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux: a signal for when the parent has ended; and orphans among the descendants become children of this process."""
MAX_OUTPUT_BYTES = 2**16
OUTPUT_PERIOD_S = 60.0
"""In which a process may write so much; what is more is dropped, and that is said once."""
MAX_TRACE_CHARACTERS = 4000
"""Of what is said of an error in code of a user, which goes to the log: its message may be a whole tensor."""
LOAD_TIMEOUT_S = 300.0
"""For the code of a user to be loaded, which may import large packages from a slow disk."""
CHECK_PARENT_EVERY_S = 1.0
ENDING_S = 5.0
"""For what was killed to end. A process in the kernel may not."""


def shortened(text: str) -> str:
    """Beginning and end of a long text.

    Example:
        >>> shortened("short"), len(shortened("x" * 10**8)) < 5000
        ('short', True)
    """
    half = MAX_TRACE_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n... {len(text) - 2 * half:,} characters ...\n{text[-half:]}"


def start_guarded(module: str, connection: Connection) -> subprocess.Popen[bytes]:
    """Start Python in a process and session of its own that calls `main()` of a module under `guarded`. Its first argument is
    the number of `connection`, which is closed here."""
    # Not with -m: the classes of its messages would belong to __main__ there, and to another module here.
    code = f"import sys; from {__name__} import guarded; guarded(int(sys.argv[1])); from {module} import main; main()"
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # the user's names may be of modules that only we find
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(connection.fileno())],
        pass_fds=[connection.fileno()],
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )
    connection.close()
    return process


def guarded(connection: int) -> None:
    """Fork. Returns in the process that is to work; the guardian, which has `connection` closed, never returns."""
    parent, (reading, writing) = os.getppid(), os.pipe()
    _ask_linux(PR_SET_CHILD_SUBREAPER, 1)
    worker = os.fork()
    if worker == 0:
        _ask_linux(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setpgid(0, 0)
        for descriptor in (1, 2):
            os.dup2(writing, descriptor)
        os.close(reading)
        os.close(writing)
        return
    os.close(writing)
    os.close(connection)
    try:
        code = _Guardian(worker, parent, reading).guard()
    except BaseException:
        end_all(worker)
        os._exit(1)
    _end_as(code)


class _Guardian:
    """Of one process that works."""

    def __init__(self, worker: int, parent: int, output: int):
        self.worker, self.parent, self.output = worker, parent, output
        self.woken, self.waking = os.pipe()
        for descriptor in (self.woken, self.waking, output):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self.waking, warn_on_full_buffer=False)
        self.is_asked_to_end = False
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.bytes_left, self.period_ends, self.has_said = MAX_OUTPUT_BYTES, 0.0, False

    def _note(self, *_: object) -> None:
        self.is_asked_to_end = True

    def guard(self) -> int:
        """Until the process has ended or is to end; returns its status, as of `os.waitpid`."""
        status = None
        while status is None and not self.is_asked_to_end and os.getppid() == self.parent:
            waiting = [self.woken, *([self.output] if self.output >= 0 else [])]
            ready, _, _ = select.select(waiting, [], [], 1.0)
            if self.woken in ready:
                with suppress(BlockingIOError):
                    os.read(self.woken, 4096)
            if self.output in ready:
                self._forward()
            status = self._status()
        end_all(self.worker)
        if self.output >= 0:
            self._forward()
        return signal.SIGKILL if status is None else status

    def _status(self) -> int | None:
        """Of the process that works, where it has ended; orphans that have ended are collected as well."""
        with suppress(ChildProcessError):
            while True:
                number, status = os.waitpid(-1, os.WNOHANG)
                if number == self.worker:
                    return status
                if number == 0:
                    return None
        return None

    def _forward(self) -> None:
        with suppress(BlockingIOError):
            while text := os.read(self.output, MAX_OUTPUT_BYTES):
                self._write(text)
            os.close(self.output)  # nobody can write any more
            self.output = -1

    def _write(self, text: bytes) -> None:
        if time.monotonic() > self.period_ends:
            self.bytes_left, self.period_ends, self.has_said = MAX_OUTPUT_BYTES, time.monotonic() + OUTPUT_PERIOD_S, False
        kept, self.bytes_left = text[: self.bytes_left], max(0, self.bytes_left - len(text))
        if len(kept) < len(text) and not self.has_said:
            self.has_said = True
            kept += f"\n[this process writes more than {MAX_OUTPUT_BYTES} bytes a minute: the rest is dropped]\n".encode()
        with suppress(OSError):
            if kept:
                os.write(2, kept)


def end_process(process: subprocess.Popen[bytes], patience_s: float = 0.5) -> int:
    """For the parent: end a guarded process and all that it has started, unless it is ending by itself: then it keeps its own
    exit code, which is returned."""
    for patience, act in ((patience_s, process.terminate), (2 * ENDING_S, process.kill)):
        try:
            return process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            act()
    return process.wait()


def end_all(worker: int) -> None:
    """Kill the group of a process that works and, on Linux, all other descendants of this one, until none is left."""
    deadline = time.monotonic() + ENDING_S
    while True:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker, signal.SIGKILL)
        for number in (worker, *descendants(os.getpid())):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)


def descendants(number: int) -> list[int]:
    """Processes that come from this one, as far as /proc says."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            children.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, waiting = [], [number]
    while waiting:
        waiting += children.get(waiting[0], [])
        found.append(waiting.pop(0))
    return found[1:]


def end_with_parent() -> None:
    """End this process, whatever it is busy with, soon after its parent has ended, however that happened."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_PARENT_EVERY_S)
    os._exit(1)


def _ask_linux(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _end_as(status: int) -> None:
    """End this process as another one has ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
