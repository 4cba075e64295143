"""Worker classes for tests of groups; imported by the processes of the ranks."""

import os
import re
import signal
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.batch import Batch, Ragged
from hybridflow.controller.protocols import Arguments, Protocol
from hybridflow.metrics import Metric, Metrics
from hybridflow.resharding.links import host_transfer
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import remote


class EchoWorker(Worker):
    """Does as little as a worker can."""

    is_distributed: ClassVar[bool] = False

    @remote("split_by_data_rank")
    def double(self, batch: Batch) -> Batch:
        """Twice the response tokens, and the rank that did it."""
        tokens = batch.tokens("response")
        rank = np.full(len(batch), self.context.rank)
        return Batch.from_columns({"doubled": Ragged(tokens.values * 2, tokens.offsets), "rank": rank})

    @remote("split_by_data_rank")
    def count(self, batch: Batch) -> Metrics:
        """Rows and tokens, as metrics that add up."""
        tokens = batch.tokens("response")
        return Metrics({"rows": Metric(len(batch), kind="sum"), "length": Metric(len(tokens.values), len(batch))})

    @remote("one_to_all")
    def nothing(self) -> None:
        """A call without work."""

    @remote("rank_zero")
    def rank(self) -> int:
        """The rank that was called."""
        return self.context.rank

    @remote("one_to_all")
    def fail_on_rank_one(self) -> None:
        """Rank 1 raises; the others would wait for it for ever."""
        if self.context.rank == 1:
            raise ValueError("rank one is tired")
        time.sleep(60)

    @remote("one_to_all")
    def die_on_rank_one(self) -> None:
        """The process of rank 1 ends at once."""
        if self.context.rank == 1:
            os._exit(1)

    @remote("one_to_all")
    def lose_partner(self) -> None:
        """The process of rank 1 ends; rank 0 raises before that is known, as a collective does."""
        if self.context.rank == 1:
            time.sleep(0.5)
            os._exit(1)
        raise ConnectionError("connection closed by peer")

    @remote("one_to_all")
    def sleep(self, seconds: float) -> float:
        """When the call ended, in seconds of this machine's clock."""
        time.sleep(seconds)
        return time.time()

    @remote("one_to_all")
    def sleep_on_rank_one(self, seconds: float) -> None:
        time.sleep(seconds if self.context.rank == 1 else 0)

    @remote("one_to_all")
    def stop_on_rank_one(self) -> None:
        """The process of rank 1 is stopped, as by a debugger."""
        if self.context.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    @remote("one_to_all")
    def meet(self, late: int) -> None:
        """Rank `late` sleeps where all are to meet."""
        if self.context.rank == late:
            time.sleep(60)
        dist.barrier()

    @remote("one_to_all")
    def wait_for_weights(self) -> None:
        """As a rank does whose weights another pool sends."""
        store, _ = host_transfer(device=torch.device("cpu"), timeout_s=60.0)
        store.get("weights")

    @remote("one_to_all")
    def hold_the_interpreter(self) -> None:
        """Rank 0 is in C code that lets no other thread run."""
        if self.context.rank == 0:
            re.match("(a+)+$", "a" * 60 + "b")

    @remote("one_to_all")
    def return_what_cannot_be_sent(self) -> object:
        """Rank 1 returns a generator."""
        return (number for number in range(3)) if self.context.rank == 1 else None

    @remote("split_by_data_rank")
    def forget_to_return(self, batch: Batch) -> Metrics:
        """Rank 1 returns nothing."""
        return Metrics() if self.context.rank == 0 else None  # type: ignore[return-value]

    @remote("one_to_all")
    def leave(self, kind: str) -> None:
        """Rank 1 raises what no rank should."""
        if self.context.rank == 1:
            raise {"exit": SystemExit(3), "interrupt": KeyboardInterrupt(), "base": GeneratorExit()}[kind]

    @remote("tests.ray.fake_workers:EveryOther")
    def visited(self) -> int:
        """Called through a protocol of the test's own."""
        return self.context.rank


class EveryOther(Protocol):
    """Calls ranks 0, 2, 4, ... and adds up what they return."""

    def distribute(self, arguments: Arguments) -> Sequence[Arguments | None]:
        return [arguments if rank % 2 == 0 else None for rank in range(self.layout.num_ranks)]

    def collect(self, results: Sequence[object]) -> object:
        return sum(result for result in results if isinstance(result, int))
