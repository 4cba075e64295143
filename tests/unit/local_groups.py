"""Groups without Ray: real workers on threads of this process, behind the real protocols."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from hybridflow import registry
from hybridflow.controller.protocols import Arguments, Protocol
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import Future, RemoteMethod


class LocalFuture:
    """The answers of the ranks, as one result."""

    def __init__(self, answers: dict[int, ThreadFuture[object]], protocol: Protocol):
        self.answers, self.protocol = answers, protocol

    def result(self, timeout_s: float | None = None) -> object:
        results: list[object] = [None] * self.protocol.layout.num_ranks
        for rank, answer in self.answers.items():
            results[rank] = answer.result(timeout_s or 60)
        return self.protocol.collect(results)

    def done(self) -> bool:
        return all(answer.done() for answer in self.answers.values())

    @property
    def later(self) -> object:
        return self


class LocalDispatcher:
    """One thread per rank, on which its calls run in the order in which they were started."""

    def __init__(self, workers: Sequence[Worker], layout: Layout, *, pool_name: str):
        """Groups have threads of their own, whatever `pool_name` says."""
        self.workers, self.layout, self.pool_name = workers, layout, pool_name
        self.before: Callable[[str], object] = lambda method: None
        """Called with the name of a method before it runs on a rank, and `after` when its answer is there."""
        self.after: Callable[[str], object] = lambda method: None
        self.threads = [ThreadPoolExecutor(max_workers=1) for _ in workers]
        self.called: list[str] = []
        """Methods in the order of their calls."""
        self.reported = Metrics()
        """What workers have reported, of the ranks whose answers count."""
        self.lock = Lock()

    @property
    def num_data_ranks(self) -> int:
        return self.layout.data

    @property
    def is_streaming(self) -> bool:
        return False

    def start(self, method: str, protocol: str, /, *args: object, **kwargs: object) -> Future[object]:
        self.called.append(method)
        built = registry.load(protocol, registry.PROTOCOLS, key=method)(self.layout)
        given = built.distribute(Arguments(args, kwargs))
        answers = {
            rank: self.threads[rank].submit(self._run, rank, method, arguments, is_read=rank in built.answering)
            for rank, arguments in enumerate(given)
            if arguments is not None
        }
        for answer in answers.values():
            answer.add_done_callback(lambda _: self.after(method))
        return LocalFuture(answers, built)

    def _run(self, rank: int, method: str, arguments: Arguments, *, is_read: bool) -> object:
        worker = self.workers[rank]
        marked = next(vars(base)[method] for base in type(worker).__mro__ if method in vars(base))
        assert isinstance(marked, RemoteMethod)
        self.before(method)
        worker.context.take_reported()
        result = marked.function(worker, *arguments.args, **arguments.kwargs)
        reported = worker.context.take_reported()
        with self.lock:
            self.reported += reported if is_read else Metrics()
        return result
