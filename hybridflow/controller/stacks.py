"""What the ranks of a run are doing: the Python stack of each, read from outside by py-spy, or else by faulthandler.

A rank that is stuck answers nobody, so its stack is read by another process of its machine: by the controller on its own, by a
task of Ray on others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

READ_TIMEOUT_S = 10.0
"""For the stack of one process."""
ALL_TIMEOUT_S = 40.0
"""For those of all nodes, whose tasks may have to start a process first."""
DUMP_SIGNAL = signal.SIGUSR2
"""Lets a rank write its stacks where py-spy may not look."""
SHOWN_FRAMES = 6
WAITING_FOR_RANKS = ("torch/distributed/", "hybridflow/resharding/", "hybridflow/rollout/lockstep.py")
"""Files in which a rank waits until others do their part."""
WAITING_FOR_THREAD = ("/threading.py", "/queue.py", "/concurrent/futures/")
CALLS = "hybridflow/controller/rank_process.py"
LEADING = ("-packages/ray/", "<frozen", "/runpy.py", "/pluggy/", CALLS)
RANK = b"RankProcess"
"""In the title of the process of a rank."""
ENGINE_THREAD = "hybridflow-engine"
State = Literal["busy", "waits for other ranks", "idle", "stopped", "gone", "unknown"]


@dataclass(frozen=True)
class RankIdentity:
    """Which process a rank is."""

    node: str
    """Name and address of its machine."""
    node_id: str
    """Ray's."""
    pid: int
    dump_file: str | None
    """Where it writes its stacks at `DUMP_SIGNAL`."""


@dataclass(frozen=True)
class Frame:
    """A function that runs."""

    function: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


def in_one_line(frames: Sequence[Frame]) -> str:
    """The innermost functions, without what leads to them in every thread."""
    own = [frame for frame in frames if not any(part in frame.file for part in LEADING)] or frames
    return " < ".join(map(str, own[:SHOWN_FRAMES]))


@dataclass(frozen=True)
class Stack:
    """What one process does."""

    state: State
    frames: tuple[Frame, ...] = ()
    """Of the thread that counts, the innermost first."""
    text: str = ""
    """All threads, or why there is none."""

    def __str__(self) -> str:
        """One line."""
        shown = in_one_line(self.frames) or self.text.strip().partition("\n")[0]
        return {"stopped": "stopped by a signal (SIGSTOP), in ", "gone": "has ended", "idle": "waits for a call"}.get(
            self.state, ""
        ) + (shown if self.state not in ("gone", "idle") else "")


def read_stacks(identities: Sequence[RankIdentity]) -> list[Stack]:
    """Of processes of this machine, several at a time."""
    with ThreadPoolExecutor(max_workers=8) as threads:
        return list(threads.map(read_stack, identities))


def stacks_of(identities: Sequence[RankIdentity]) -> list[Stack]:
    """Of processes anywhere in the cluster, within `ALL_TIMEOUT_S`."""
    here = ray.get_runtime_context().get_node_id()
    by_node: dict[str, list[int]] = {}
    for index, identity in enumerate(identities):
        by_node.setdefault(identity.node_id, []).append(index)
    elsewhere = {node: members for node, members in by_node.items() if node != here}
    tasks = {node: _on_node(node, [identities[index] for index in members]) for node, members in elsewhere.items()}
    found: dict[int, Stack] = {}
    if here in by_node:
        found |= dict(zip(by_node[here], read_stacks([identities[index] for index in by_node[here]]), strict=True))
    deadline = time.monotonic() + ALL_TIMEOUT_S
    for node, task in tasks.items():
        try:
            read: list[Stack] = ray.get(task, timeout=max(0.0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            problem = f"its node does not answer: {type(error).__name__}"
            read = [Stack("unknown", text=problem)] * len(by_node[node])
        found |= dict(zip(by_node[node], read, strict=True))
    return [found[index] for index in range(len(identities))]


def _on_node(node: str, identities: list[RankIdentity]) -> ray.ObjectRef[list[Stack]]:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task: ray.ObjectRef[list[Stack]] = (
        ray.remote(read_stacks).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy).remote(identities)
    )
    return task


def read_stack(identity: RankIdentity) -> Stack:
    """Of a process of this machine."""
    letter = _state_letter(identity.pid)
    if letter in ("Z", "X", ""):
        return Stack("gone")
    is_stopped = letter == "T"
    threads, text = _by_py_spy(identity.pid, is_stopped=is_stopped)
    if not threads and not is_stopped and identity.dump_file is not None:
        threads, text = _by_faulthandler(identity.pid, Path(identity.dump_file))
    frames = _thread_that_counts(threads)
    if is_stopped:
        return Stack("stopped", frames, text)
    return Stack(_state(frames) if threads else "unknown", frames, text)


def process_stack(pid: int) -> str:
    """All threads of a process of this machine that may be no rank yet, or why they cannot be had."""
    return _by_py_spy(pid, is_stopped=_state_letter(pid) == "T")[1]


def starting_ranks(known: Collection[int], node_id: str) -> list[int]:
    """Processes that Ray has started on this node, which is this machine, and that have not come up as ranks, as `known` have:
    Python starts in them, or the constructor runs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command, parent = (entry / "cmdline").read_bytes(), (entry / "stat").read_text().rpartition(")")[2].split()[1]
            is_starting = b"default_worker.py" in command or (command.startswith(b"ray::") and RANK in command)
            is_of_this_cluster = node_id.encode() in Path("/proc", parent, "cmdline").read_bytes()  # the raylet's
            if is_starting and is_of_this_cluster and int(entry.name) not in known:
                found.append(int(entry.name))
    return sorted(found)


def _state_letter(pid: int) -> str:
    """Of /proc: T stopped, Z ended and not yet collected; empty where there is no such process."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return ""
    except (OSError, IndexError):
        return "?"  # another user's, or a system without /proc


def _by_py_spy(pid: int, *, is_stopped: bool) -> tuple[dict[str, tuple[Frame, ...]], str]:
    """Thread name -> frames, and the text for people. A process that runs is held for some milliseconds."""
    program = shutil.which("py-spy", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
    if program is None:
        return {}, "py-spy is not installed"
    command = [program, "dump", "--json", "--pid", str(pid), *(["--nonblocking"] if is_stopped else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=READ_TIMEOUT_S, check=False)
        found = json.loads(done.stdout) if done.returncode == 0 else []
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {}, f"py-spy cannot read process {pid}: {error}"
    threads: dict[str, tuple[Frame, ...]] = {}
    for number, thread in enumerate(found):
        name = str(thread.get("thread_name") or f"thread {number}")
        frames = tuple(Frame(str(f["name"]), str(f["filename"]), int(f["line"])) for f in thread["frames"])
        threads[name if name not in threads else f"{name} {number}"] = frames
    return threads, _text(threads) if threads else f"py-spy cannot read process {pid}: {done.stderr.strip()[-300:]}"


def _by_faulthandler(pid: int, file: Path) -> tuple[dict[str, tuple[Frame, ...]], str]:
    """As `_by_py_spy`, by the process itself: its handler needs no Python to run."""
    try:
        before = len(file.read_bytes())
        os.kill(pid, DUMP_SIGNAL)
        deadline, text = time.monotonic() + 3.0, ""
        while time.monotonic() < deadline and not text.endswith("\n"):
            time.sleep(0.2)
            text = file.read_bytes()[before:].decode(errors="replace")
    except OSError as error:
        return {}, f"neither py-spy nor faulthandler can read process {pid}: {error}"
    threads: dict[str, tuple[Frame, ...]] = {}
    for number, part in enumerate(re.split(r"\n(?=Thread |Current thread )", text)):
        found = re.findall(r'File "(.*)", line (\d+) in (.*)', part)
        threads[f"thread {number}"] = tuple(Frame(function, name, int(line)) for name, line, function in found)
    return threads, text


def _text(threads: Mapping[str, Sequence[Frame]]) -> str:
    lines = []
    for name, frames in threads.items():
        lines.append(f"  {name}:")
        lines += [f"    {frame.function} ({frame.file}:{frame.line})" for frame in frames]
    return "\n".join(lines)


def _thread_that_counts(threads: Mapping[str, tuple[Frame, ...]]) -> tuple[Frame, ...]:
    """The thread that runs a call; where it waits for the thread of the engine, that one. Empty where there is no call."""
    calling = next((frames for frames in threads.values() if any(CALLS in frame.file for frame in frames)), ())
    if calling and any(part in calling[0].file for part in WAITING_FOR_THREAD):
        engine = next((frames for name, frames in threads.items() if name.startswith(ENGINE_THREAD)), ())
        if engine and not any(part in engine[0].file for part in WAITING_FOR_THREAD):
            return engine
    return calling


def _state(frames: Sequence[Frame]) -> State:
    if not frames:
        return "idle"
    is_waiting = any(part in frame.file for frame in frames[:3] for part in WAITING_FOR_RANKS)
    return "waits for other ranks" if is_waiting else "busy"
