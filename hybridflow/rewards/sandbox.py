"""Programs that nobody trusts, run one by one in processes that may compute, write into a folder of their own, and end.

docs/rewards.md says what this holds and what it does not.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hybridflow.errors import RewardError

CHILD = Path(__file__).with_name("sandbox_child.py")
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types")
GRACE_S = 5.0
"""For the process that watches, beyond the time of its runs."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run."""

    cpu_s: float = 4.0
    """Seconds of the processor, rounded down, at least 1."""
    wall_s: float = 6.0
    """Seconds of the clock, of which a busy machine takes more."""
    memory_mib: int = 512
    """Of all processes together, and addresses of each."""
    max_processes: int = 16
    max_threads: int = 128
    """Of all processes together."""
    file_mib: int = 32
    """Of each file; all files together 64, where a folder in memory can be had."""
    output_kib: int = 256
    """Standard output and error together."""


@dataclass(frozen=True)
class ProgramRun:
    """How a run ended."""

    exit_code: int
    reason: Literal["time", "memory", "processes", "output"] | None
    """The limit that it has met; memory also shows as a MemoryError in `stderr`."""
    stdout: str
    stderr: str
    """The last 2,000 bytes."""
    seconds: float


async def run_program(
    program: str,
    inputs: Sequence[str] = ("",),
    *,
    limits: Limits | None = None,
    stops_at_failure: bool = True,
    allow_unconfined: bool = False,
) -> list[ProgramRun]:
    """Run a Python program once for each text of `inputs`, its standard input, one after the other.

    Fewer runs come back where one has failed and `stops_at_failure`. Cancelling kills all that was started.

    Raises:
        RewardError: this machine cannot hold a program, and `allow_unconfined` does not allow one that is not held.

    Example:
        >>> asyncio.run(run_program("print(int(input()) + 1)", ["41"]))[0].stdout
        '42\\n'
    """
    if sys.platform != "linux":
        raise RewardError("programs are held by means of Linux; on another system the reward 'code' is not to be had")
    held = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="hybridflow_code_", ignore_cleanup_errors=True) as folder:
        job = _job(program, inputs, held, folder) | {
            "stops_at_failure": stops_at_failure,
            "allow_unconfined": allow_unconfined,
        }
        answer = await _answer(job, timeout_s=held.wall_s * len(inputs) + GRACE_S)
    if answer["missing"] and not allow_unconfined:
        lacks = " and ".join(map(str, answer["missing"]))
        raise RewardError(
            f"this machine's kernel lacks {lacks}, without which a program may write to any file or use the network. Score on "
            "another machine, or let programs run unconfined by the option allow_unconfined=true of the reward 'code'"
        )
    return [ProgramRun(**run) for run in answer["runs"]]


def _job(program: str, inputs: Sequence[str], limits: Limits, folder: str) -> dict[str, object]:
    executable = Path(sys.executable)
    readable = {*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, str(Path(sys.prefix).resolve())}
    environment = {
        "PATH": f"{executable.parent}:/usr/bin:/bin",
        "HOME": folder,
        "TMPDIR": folder,
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    return {
        "folder": folder,
        "file": "program.py",
        "program": program,
        "inputs": list(inputs),
        "command": [str(executable), "-s", "program.py"],
        "environment": environment,
        "readable": sorted(readable),
        "cpu_s": limits.cpu_s,
        "wall_s": limits.wall_s,
        "memory_bytes": limits.memory_mib << 20,
        "file_bytes": limits.file_mib << 20,
        "max_processes": limits.max_processes,
        "max_threads": limits.max_threads,
        "output_bytes": limits.output_kib << 10,
    }


async def _answer(job: dict[str, object], *, timeout_s: float) -> dict[str, list]:  # type: ignore[type-arg]
    """What the watching process says of the job; it ends with this call, and everything below it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-S", str(CHILD)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    try:
        said, wrong = await asyncio.wait_for(process.communicate(json.dumps(job).encode()), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise OSError(f"the sandbox ended with exit code {process.returncode}: {wrong.decode(errors='replace')[-2000:]}")
    answer: dict[str, list] = json.loads(said)  # type: ignore[type-arg]
    return answer
