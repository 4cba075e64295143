"""The process that scores: loads the function once, then answers lists of inputs, one message per answer.

`RewardPool` starts it with the number of a socket as the first argument. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from hybridflow.errors import HybridflowError, RewardError
from hybridflow.orphan import end_with_parent
from hybridflow.rewards.call import Kind, RewardFunction, RewardInput, Score, load_reward_function


@dataclass(frozen=True)
class Ready:
    """The function is loaded."""

    name: str
    kind: Kind


@dataclass(frozen=True)
class Failure:
    """A response that could not be scored."""

    reason: Literal["raised", "timed out", "died"]
    detail: str
    """Traceback, or what happened to the process."""


@dataclass(frozen=True)
class Stop:
    """Nothing can be scored: a mistake of the configuration, not of a response."""

    problem: str


def main() -> None:
    """Serve until the other end closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    end_with_parent()  # a function that never returns must not outlive a killed parent
    connection = Connection(int(sys.argv[1]))
    try:
        function = load_reward_function(connection.recv())
    except HybridflowError as error:
        connection.send(Stop(str(error)))
        return
    except Exception:
        connection.send(Stop(f"the reward function does not load:\n{traceback.format_exc()}"))
        return
    connection.send(Ready(function.name, function.kind))
    own = os.getpid()
    while True:
        try:
            number, inputs = connection.recv()
        except EOFError:
            return
        for index, answer in enumerate(_answers(function, inputs)):
            if os.getpid() != own:  # a function that forks returns twice: what the copy says is nobody's answer
                os._exit(0)
            connection.send((number, index, answer))


def _answers(function: RewardFunction, inputs: Sequence[RewardInput]) -> Iterator[Score | Failure | Stop]:
    """One for each input, in their order."""
    if function.kind == "batch":
        try:
            yield from function.score_all(inputs)
        except RewardError as error:
            yield Stop(str(error))
        except (Exception, SystemExit):
            yield from [_raised()] * len(inputs)
        return
    for reward_input in inputs:
        try:
            yield function.score(reward_input)
        except RewardError as error:
            yield Stop(str(error))
        except (Exception, SystemExit):
            yield _raised()


def _raised() -> Failure:
    return Failure("raised", traceback.format_exc())
