"""The process that scores: loads the function once, then answers lists of inputs, one message per answer.

`RewardPool` starts it with the number of a socket as the first argument. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

from hybridflow.errors import HybridflowError, RewardError
from hybridflow.guardian import end_with_parent, shortened
from hybridflow.rewards.call import Kind, RewardInput
from hybridflow.rewards.results import Failure, Score
from hybridflow.rewards.scorer import Scorer


@dataclass(frozen=True)
class Ready:
    """The function is loaded."""

    name: str
    kind: Kind
    concurrency: int = 1
    """Inputs that are scored at once, where more than one: those that are sent together are."""


@dataclass(frozen=True)
class Stop:
    """Nothing can be scored: a mistake of the configuration, not of a response."""

    problem: str


def main() -> None:
    """Serve until the other end closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    end_with_parent()  # a function that never returns must not outlive a killed parent
    with suppress(EOFError, ConnectionError):  # nobody is at the other end any more
        _serve(Connection(int(sys.argv[1])))


def _serve(connection: Connection) -> None:
    try:
        scorer = Scorer(connection.recv())
    except HybridflowError as error:
        connection.send(Stop(str(error)))
        return
    except Exception:
        connection.send(Stop(f"the reward function does not load:\n{shortened(traceback.format_exc())}"))
        return
    connection.send(Ready(scorer.name, scorer.kind, scorer.concurrency if scorer.is_async else 1))
    own = os.getpid()
    while True:
        number, inputs = connection.recv()
        for index, answer in enumerate(_answers(scorer, inputs)):
            if os.getpid() != own:  # a function that forks returns twice: what the copy says is nobody's answer
                os._exit(0)
            connection.send((number, index, answer))


def _answers(scorer: Scorer, inputs: Sequence[RewardInput]) -> Iterator[Score | Failure | Stop]:
    """One for each input, in their order."""
    try:
        if scorer.kind == "batch":
            yield from scorer.score_all(inputs)
        elif scorer.is_async:
            begun = [scorer.begin(reward_input) for reward_input in inputs]
            yield from (finish() for finish in begun)
        else:
            yield from (scorer.begin(reward_input)() for reward_input in inputs)
    except RewardError as error:
        yield Stop(str(error))
