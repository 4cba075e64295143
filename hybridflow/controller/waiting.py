"""Waiting with a limit: for ranks, whose stacks are read when it is over, and for what may never return on the controller.

Every wait of the controller goes through here. While it lasts, a line each half minute says who is waited for; when its limit
is over, the error names the ranks that are stuck, which need not be those that have not answered: these may wait for others.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from hybridflow import interrupts
from hybridflow.controller import stacks
from hybridflow.controller.rank_process import RankProcess
from hybridflow.controller.stacks import RankIdentity, Stack
from hybridflow.errors import CallTimeoutError, HybridflowError, WorkerDiedError, WorkerError, listed

logger = logging.getLogger("hybridflow")
T = TypeVar("T")

TOLD_FROM_S = 5.0
"""Of a part of the start, from which on the log has its seconds."""
SECONDS_OF_SILENCE = 30.0
"""After which the log says again who is waited for."""
DEATHS_SHOW_S = 5.0
"""The time in which a process that has ended is found out, after a partner of it has failed."""
MAX_NAMED = 4
"""Ranks in one line."""


@dataclass(eq=False)
class Ranks:
    """The processes of one pool, as far as waiting for them needs to know."""

    name: str
    processes: list[ActorHandle[RankProcess]]
    identities: list[RankIdentity] = field(default_factory=list)
    """Empty until all processes have said who they are."""
    others: list[Ranks] = field(default_factory=list)
    """All pools of the run; those of this one may wait for ranks of another."""

    @property
    def nodes(self) -> list[str]:
        """Machine of each rank."""
        return [identity.node for identity in self.identities]

    def place(self, rank: int) -> str:
        """For people."""
        return f"rank {rank} (node {self.nodes[rank]})" if self.identities else f"rank {rank} of pool '{self.name}'"


@dataclass(frozen=True)
class Job:
    """What one rank has been asked to do."""

    ranks: Ranks
    rank: int
    role: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.role}.{self.method}"

    def failed(self, cause: str, kind: type[WorkerError] = WorkerError) -> WorkerError:
        """An error that names the place."""
        node = self.ranks.nodes[self.rank] if self.ranks.identities else f"of pool '{self.ranks.name}'"
        return kind(role=self.role, rank=self.rank, node=node, method=self.method, cause=cause)


Jobs = Mapping["ray.ObjectRef[Any]", Job]


@contextmanager
def told(what: str) -> Iterator[None]:
    """Log how long the block, or the function that this decorates, has taken, where that is worth a word."""
    started = time.monotonic()
    yield
    if (seconds := time.monotonic() - started) >= TOLD_FROM_S:
        logger.info("%s took %.0f s", what, seconds)


def jobs_of(ranks: Ranks, role: str, method: str, references: Sequence[ray.ObjectRef[Any]]) -> Jobs:
    """Calls of `method` on the ranks of a pool, from rank 0 on."""
    return {reference: Job(ranks, rank, role, method) for rank, reference in enumerate(references)}


def results_of(jobs: Jobs, limit_s: float) -> list[Any]:
    """The answers of all, in their order. The first failure is raised at once, however long the others take.

    Raises:
        WorkerError: a rank failed, or returned what cannot be sent.
        WorkerDiedError: the process of a rank has ended. To tell this from what it does to other ranks, those that have not
            answered are given `DEATHS_SHOW_S` after the first failure.
        CallTimeoutError: a rank has not answered within `limit_s`.
    """
    references, started = list(jobs), time.monotonic()
    interrupts.raise_if_lost()
    while True:
        left_s = limit_s - (time.monotonic() - started)
        try:
            return ray.get(references, timeout=max(0.0, min(left_s, SECONDS_OF_SILENCE)))
        except ray.exceptions.GetTimeoutError:
            interrupts.raise_if_lost()
            if left_s <= SECONDS_OF_SILENCE:
                raise overdue(_late(jobs), limit_s) from None
            _say(jobs, time.monotonic() - started)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError):
                # What a rank says whose partner has gone, such as a closed connection, hides the cause.
                ray.wait(references, num_returns=len(references), timeout=DEATHS_SHOW_S, fetch_local=False)
            raise _failure(jobs) or error from None


def _late(jobs: Jobs) -> list[Job]:
    done = set(ray.wait(list(jobs), num_returns=len(jobs), timeout=0, fetch_local=False)[0])
    return [job for reference, job in jobs.items() if reference not in done]


def _say(jobs: Jobs, seconds: float) -> None:
    late = _late(jobs)
    for name in dict.fromkeys(job.name for job in late):
        members = [job for job in late if job.name == name]
        num_all = sum(job.name == name for job in jobs.values())
        places = listed((job.ranks.place(job.rank) for job in members), MAX_NAMED)
        text = "%s: %d of %d ranks are done; after %.0f s still waiting for %s"
        logger.info(text, name, num_all - len(members), num_all, seconds, places)


def _failure(jobs: Jobs) -> WorkerError | None:
    """The first rank whose process has ended, or else the first that has failed, as an error."""
    first: WorkerError | None = None
    for reference, job in jobs.items():
        try:
            ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            continue
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            first = first or (cause if isinstance(cause, WorkerError) else job.failed(str(error)))
        except ray.exceptions.RayError as error:
            died = "The process died before it answered (killed, out of memory, or its node was lost)"
            return job.failed(f"{died}. Ray says: {error}", WorkerDiedError)
    return first


def all_stacks(pools: Sequence[Ranks]) -> str:
    """What every rank does, for people."""
    return "\n".join(_notes(_stacks(pools)))


def _notes(found: Sequence[tuple[Ranks, int, Stack]]) -> list[str]:
    return [f"pool '{ranks.name}' {ranks.place(rank)}: {stack.state}\n{stack.text}" for ranks, rank, stack in found]


def overdue(late: Sequence[Job], limit_s: float) -> CallTimeoutError:
    """Who is stuck, found out from the stacks of all ranks of the run; all stacks are a note of the error."""
    names = " and ".join(dict.fromkeys(job.name for job in late))
    num_ranks = len({(id(job.ranks), job.rank) for job in late})
    places = listed((job.ranks.place(job.rank) for job in late), MAX_NAMED)
    text = f"{names} has not ended after run.timeout_s={limit_s:g} s on {num_ranks} rank(s): {places}. "
    lines, notes = _stuck(late)
    error = CallTimeoutError(f"{text}{lines}\nIf this takes long by nature, raise run.timeout_s")
    error.add_note("\n".join(["What every rank was doing:", *notes]))
    return error


def _stuck(late: Sequence[Job]) -> tuple[str, list[str]]:
    """A sentence on the ranks that are stuck, and the stacks of all."""
    pools = list({id(ranks): ranks for job in late for ranks in (job.ranks, *job.ranks.others)}.values())
    starting = [ranks for ranks in pools if not ranks.identities]
    found = _stacks([ranks for ranks in pools if ranks.identities])
    notes = _notes(found)
    is_late = {(id(job.ranks), job.rank) for job in late}
    mine = [entry for entry in found if (id(entry[0]), entry[1]) in is_late]
    others = [entry for entry in found if (id(entry[0]), entry[1]) not in is_late]
    # Of ranks that have not answered, those that wait for nobody; where all of them do, whom they may wait for.
    blamed = _blamed(mine) or _blamed(others) or [entry for entry in mine if entry[2].state == "unknown"]
    if starting:
        known = {identity.pid for ranks in pools for identity in ranks.identities}
        started = {
            pid: stacks.process_stack(pid)
            for pid in stacks.starting_ranks(known, ray.get_runtime_context().get_node_id())[:MAX_NAMED]
        }
        notes += [f"process {pid}, in which Python starts:\n{text}" for pid, text in started.items()]
        shown = "; ".join(f"process {pid} of this machine: {_innermost(text)}" for pid, text in started.items())
        return f"Their processes have not come up. {shown or 'None of this machine is starting'}.", notes
    if not blamed:
        return "None of them is in a call: their answers did not arrive, so Ray itself may be stuck.", notes
    lines = [f"{ranks.place(rank)} of pool '{ranks.name}' is stuck: {stack}" for ranks, rank, stack in blamed]
    num_waiting = sum(stack.state == "waits for other ranks" for _, _, stack in found)
    return listed(lines, MAX_NAMED, separator="; ") + (
        f"; {num_waiting} other rank(s) wait for it" if num_waiting else ""
    ), notes


def _blamed(entries: Sequence[tuple[Ranks, int, Stack]]) -> list[tuple[Ranks, int, Stack]]:
    """Those that were stopped or have ended, or else those that are busy."""
    gone = [entry for entry in entries if entry[2].state in ("stopped", "gone")]
    return gone or [entry for entry in entries if entry[2].state == "busy"]


def _stacks(pools: Sequence[Ranks]) -> list[tuple[Ranks, int, Stack]]:
    places = [(ranks, rank) for ranks in pools for rank in range(len(ranks.identities))]
    try:
        read = bounded(
            lambda: stacks.stacks_of([ranks.identities[rank] for ranks, rank in places]),
            2 * stacks.ALL_TIMEOUT_S,
            "reading the stacks of all ranks",
        )
    except (HybridflowError, ray.exceptions.RayError, RuntimeError) as error:
        read = [Stack("unknown", text=f"no stack: {error}")] * len(places)
    return [(ranks, rank, stack) for (ranks, rank), stack in zip(places, read, strict=True)]


def _innermost(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    return " < ".join(lines[: stacks.SHOWN_FRAMES]) or text.strip().partition("\n")[0]


def bounded(function: Callable[[], T], limit_s: float, doing: str) -> T:
    """What `function` returns or raises, by a thread of its own that is left behind where it takes longer than `limit_s`.

    Example: `bounded(lambda: ray.shutdown(), 30.0, "ending Ray")`.

    Raises:
        CallTimeoutError: it does; with what that thread does.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:  # raised again by whoever waits
            raised.append(error)

    thread = threading.Thread(target=run, name=f"hybridflow-{doing}", daemon=True)
    thread.start()
    wait_for_thread(thread, thread.join, lambda: not thread.is_alive(), limit_s, doing)
    if raised:
        raise raised[0]
    return result[0]


def wait_for_thread(
    thread: threading.Thread, wait: Callable[[float], object], is_done: Callable[[], bool], limit_s: float, doing: str
) -> None:
    """Call `wait` with some seconds until `is_done`; a line each half minute says what `thread` does.

    Raises:
        CallTimeoutError: it is not done within `limit_s`.
    """
    started = said = time.monotonic()
    while not is_done():
        wait(min(1.0, limit_s))
        interrupts.raise_if_lost()
        now = time.monotonic()
        if not is_done() and now - started >= limit_s:
            error = CallTimeoutError(f"{doing} has not ended after {limit_s:g} s: {thread_line(thread.ident)}")
            error.add_note(f"The thread of it:\n{thread_text(thread.ident)}")
            raise error
        if now - said >= SECONDS_OF_SILENCE:
            said = now
            logger.info("%s is not done after %.0f s: %s", doing, now - started, thread_line(thread.ident))


@contextmanager
def ended_after(limit_s: float, doing: str) -> Iterator[None]:
    """End the process where the block takes longer and C code holds the interpreter, so that no thread of Python can say so:
    faulthandler needs none. A process beside this one, which waits for what it writes, has the last word."""
    file = Path(tempfile.gettempdir(), f"hybridflow-{os.getpid()}-stacks.txt")
    words = f"\nThe run failed.\n{doing} has not ended after {limit_s:g} s. What every thread was doing is in {file}"
    tell = 'cat > "$0"; if [ -s "$0" ]; then echo "$1" >&2; else rm -f "$0"; fi'
    teller = subprocess.Popen(["/bin/sh", "-c", tell, file, words], stdin=subprocess.PIPE, start_new_session=True)
    assert teller.stdin is not None, "asked for"
    faulthandler.dump_traceback_later(limit_s, exit=True, file=teller.stdin)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        teller.stdin.close()
        teller.wait()


def thread_line(ident: int | None) -> str:
    """What a thread of this process does, in one line, the innermost function first."""
    frame = sys._current_frames().get(ident or 0)
    if frame is None:
        return "its thread has ended"
    entries = traceback.extract_stack(frame)[::-1]
    return stacks.in_one_line([stacks.Frame(entry.name, entry.filename, entry.lineno or 0) for entry in entries])


def thread_text(ident: int | None) -> str:
    """What a thread of this process does, with the lines of code."""
    frame = sys._current_frames().get(ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "it has ended"
