"""Runs as processes of their own, which can be killed and must leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ray.forked_workers import MARK

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Two idle processes of Ray's own that look for the rest of a killed cluster for a minute before they end."""


def _heed_signals() -> None:
    """As in a terminal; a shell lets its jobs in the background ignore Ctrl-C, and nohup the end of the terminal."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class StartedProcess:
    """`python -m MODULE ARGUMENTS` with everything that it has started."""

    module: str
    arguments: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of this process."""
    folder: Path | None = None
    """To work in; None is that of this process."""
    forking: Path | None = None
    """Folder of `forked_workers`, where its ranks are to be forked; they do not end with whoever asked Ray for them."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        path = {"PYTHONPATH": f"{self.forking}:{Path(__file__).parents[2]}"} if self.forking is not None else {}
        with self.log.open("w") as output:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", self.module, *self.arguments],
                env={**os.environ, **path, **self.environment, MARK: self.mark},
                cwd=self.folder,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_heed_signals,
            )

    def wait_for(self, file: Path) -> None:
        """Wait until the run has written this file."""
        wait_until(lambda: file.exists() or self.driver.poll() is not None, lambda: f"no {file}:\n{self.log.read_text()}")
        assert file.exists(), f"the run ended without {file}:\n{self.log.read_text()}"

    def wait(self) -> int:
        """Wait until the command has ended; returns its exit code."""
        return self.driver.wait(timeout=120)

    def kill(self) -> None:
        """SIGKILL the command's own process, and no other."""
        self.driver.kill()
        self.driver.wait()

    def kill_all(self) -> None:
        """SIGKILL everything that the command has started, and itself."""
        for number in self.processes():
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.driver.wait()

    def working(self) -> list[str]:
        """Command lines of the processes that compute or hold memory."""
        return [command for command in self.processes().values() if not command.startswith(AGENTS)]

    def processes(self) -> dict[int, str]:
        """Process id -> command line of all that have the mark."""
        forked = {path.suffix[1:] for path in self.forking.glob(f"{self.mark}.*")} if self.forking is not None else set()
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.name in forked or f"{MARK}={self.mark}".encode() in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it has ended, or is somebody else's
        return found


@contextmanager
def started(module: str, arguments: Sequence[str], log: Path, **options: Any) -> Iterator[StartedProcess]:
    """A command as a process; `options` are further fields of it. Nothing that it has started is left after the block."""
    process = StartedProcess(module, arguments, log, **options)
    try:
        yield process
    finally:
        process.kill_all()


def training(arguments: Sequence[str], log: Path, **options: Any) -> AbstractContextManager[StartedProcess]:
    """A run as a process."""
    return started("hybridflow.train", arguments, log, **options)


def wait_until(condition: Callable[[], bool], problem: Callable[[], str], *, timeout_s: float = 90.0) -> None:
    """Wait for a condition; fails with the text of `problem` when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, problem()
        time.sleep(0.05)
