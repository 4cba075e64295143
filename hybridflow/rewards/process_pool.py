"""Processes that score responses, with a time limit for each response.

Children are started by exec, never by fork: a parent may hold CUDA contexts and threads. They answer response by response,
so the parent always knows which one is being worked on: when its time is over the child is killed, whatever it is stuck in,
that response fails, and the others of its list go to another child. No response is scored twice, but where one of many
`async` calls under way blocks: which one shows when each is scored alone.
"""

from __future__ import annotations

import logging
import math
import socket
import struct
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from hybridflow.config.schema import RewardConfig
from hybridflow.errors import RewardError
from hybridflow.guardian import LOAD_TIMEOUT_S, end_process, start_guarded
from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.child import Ready, Stop
from hybridflow.rewards.results import Failure, Score

logger = logging.getLogger("hybridflow")
MAX_INPUTS_PER_MESSAGE = 32
ASYNC_GRACE_S = 2.0
"""How much longer than the process itself the parent waits for coroutines, which only blocking ones make use of."""


@dataclass
class _Child:
    """One process and what it is doing."""

    process: subprocess.Popen[bytes]
    connection: Connection
    deadline: float
    is_ready: bool = False
    work: deque[int] = field(default_factory=deque)
    """Inputs sent and not answered, by index; the first is being scored."""
    num_lists: int = 0
    """Sent so far: the number of the last one is in each answer to it."""
    num_answers: int = 0
    """To the last list."""

    def end(self, patience_s: float = 0.5) -> int:
        """As of `end_process`."""
        self.connection.close()
        return end_process(self.process, patience_s)

    def is_answer(self, number: int, index: int) -> bool:
        """Whether an answer is the one that is due. Others are of copies of the process, or of no use any more."""
        return bool(self.work) and (number, index) == (self.num_lists, self.num_answers)


@dataclass
class _Job:
    """The inputs of one call and how far it is."""

    inputs: Sequence[RewardInput]
    waiting: deque[list[int]]
    """Lists of inputs to be sent."""
    results: dict[int, Score | Failure] = field(default_factory=dict)


class RewardPool:
    """`reward.num_processes` processes, which have loaded the function when the constructor returns.

    Raises:
        RewardError: the function cannot be loaded.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        self.function = Ready("", "sequential")
        """What the function says of itself."""
        self._has_timed_out = False
        self._children = [_spawn(config) for _ in range(config.num_processes)]
        self._work(_Job([], deque()), until=lambda: any(child.is_ready for child in self._children))

    def score(self, inputs: Sequence[RewardInput]) -> list[Score | Failure]:
        """The score of each input, or why it has none. Takes at most `reward.timeout_s` for each.

        Raises:
            RewardError: the function says that it cannot score at all, or a new process cannot load it; or the processes
                have ended, by `close` or by such an error.
        """
        if inputs and not self._children:
            raise RewardError("the scoring processes have ended: they were closed, or an earlier call failed")
        job = _Job(inputs, deque(self._lists(len(inputs))))
        self._work(job, until=lambda: len(job.results) == len(inputs))
        return [job.results[index] for index in range(len(inputs))]

    def close(self) -> None:
        """End the processes."""
        for child in self._children:
            child.process.terminate()
        for child in self._children:
            child.end(0.0)
        self._children = []

    def _lists(self, num_inputs: int) -> list[list[int]]:
        """What goes to a child at once: all inputs of a batch function, else few enough that the children end together."""
        if self.function.kind == "batch":
            return [list(range(num_inputs))] if num_inputs else []
        size = min(MAX_INPUTS_PER_MESSAGE, -(-num_inputs // (4 * self.config.num_processes)))
        if self.function.concurrency > 1:
            size = min(self.function.concurrency, -(-num_inputs // self.config.num_processes))
        return [list(range(start, min(start + size, num_inputs))) for start in range(0, num_inputs, max(size, 1))]

    def _work(self, job: _Job, *, until: Callable[[], bool]) -> None:
        """Send and listen. Whatever is raised on the way ends the processes, since nothing can follow it."""
        try:
            while not until():
                for place, child in enumerate(self._children):
                    if job.waiting and child.is_ready and not child.work:
                        self._send(place, job)
                self._listen(job)
        except BaseException:
            self.close()
            raise

    def _send(self, place: int, job: _Job) -> None:
        child, indices = self._children[place], job.waiting.popleft()
        num_timed = len(indices) if self.function.kind == "batch" else 1
        child.deadline = time.monotonic() + self._timeout_s(num_timed)
        child.work, child.num_answers, child.num_lists = deque(indices), 0, child.num_lists + 1
        try:
            child.connection.send((child.num_lists, [job.inputs[index] for index in indices]))
        except OSError:  # it ended while it had nothing to do, so none of these is to blame
            child.work.clear()
            job.waiting.appendleft(indices)
            self._replace(place)

    def _listen(self, job: _Job) -> None:
        """Take what the children say until the next of them must have said something."""
        active = [child for child in self._children if child.work or not child.is_ready]
        time_left = min((child.deadline for child in active), default=0.0) - time.monotonic()
        speaking = wait([child.connection for child in active], timeout=max(time_left, 0.0))
        for place, child in enumerate(list(self._children)):
            if child.connection in speaking:
                self._receive(place, job)
            elif child in active and time.monotonic() > child.deadline:
                self._time_out(place, job)

    def _receive(self, place: int, job: _Job) -> None:
        child = self._children[place]
        try:
            while child.connection.poll():
                match child.connection.recv():
                    case Ready() as function:
                        child.is_ready, self.function = True, function
                    case Stop(problem):
                        raise RewardError(problem)
                    case (number, index, answer) if child.is_answer(number, index):
                        if isinstance(answer, Stop):
                            raise RewardError(answer.problem)
                        child.num_answers += 1
                        job.results[child.work.popleft()] = answer
                        child.deadline = time.monotonic() + self._timeout_s(1)
        except (EOFError, OSError):
            exit_code = self._replace(place)
            if not child.is_ready:
                problem = f"the process ended with exit code {exit_code} while it loaded the reward function"
                raise RewardError(problem) from None
            self._fail(child, job, Failure("died", f"the scoring process ended with exit code {exit_code}"))

    def _time_out(self, place: int, job: _Job) -> None:
        child = self._children[place]
        if not child.is_ready:
            named = ", ".join(term.path or term.name for term in self.config.terms)
            raise RewardError(f"the reward {named} was not loaded within {LOAD_TIMEOUT_S:g} s: see what it waits for on import")
        self._replace(place, patience_s=0.0)
        failure = Failure("timed out", f"no result within reward.timeout_s={self.config.timeout_s}")
        if not self._has_timed_out:  # a step of which all do takes long, and nobody would know why
            logger.warning("a response got %s; each that takes so long holds up the step", failure.detail)
        self._has_timed_out = True
        self._fail(child, job, failure)

    def _timeout_s(self, num_inputs: int) -> float:
        return self.config.timeout_s * num_inputs + (ASYNC_GRACE_S if self.function.concurrency > 1 else 0.0)

    def _fail(self, child: _Child, job: _Job, failure: Failure) -> None:
        """The input being scored fails, of a batch function all of them; the others wait for another child."""
        if not child.work:  # it ended just after its last answer
            return
        if self.function.concurrency > 1 and len(child.work) > 1:  # each may be to blame
            job.waiting.extendleft([index] for index in reversed(child.work))
            return
        failed = list(child.work) if self.function.kind == "batch" else [child.work.popleft()]
        job.results |= dict.fromkeys(failed, failure)
        if child.work and self.function.kind == "sequential":
            job.waiting.appendleft(list(child.work))

    def _replace(self, place: int, patience_s: float = 0.5) -> int:
        """Start another process in the place of one that cannot go on; returns the exit code of that one."""
        exit_code = self._children[place].end(patience_s)
        self._children[place] = _spawn(self.config)
        return exit_code


def _spawn(config: RewardConfig) -> _Child:
    near, far = socket.socketpair()
    # A process that was stopped neither takes nor completes a message.
    limit = struct.pack("ll", math.ceil(config.timeout_s), 0)
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        near.setsockopt(socket.SOL_SOCKET, option, limit)
    ours, theirs = Connection(near.detach()), Connection(far.detach())
    process = start_guarded("hybridflow.rewards.child", theirs)
    ours.send(config)
    return _Child(process, ours, deadline=time.monotonic() + LOAD_TIMEOUT_S)
