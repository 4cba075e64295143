"""What makes a worker's method callable on a whole group: the mark, and the call that it turns into.

A worker class is used twice. On a rank it is an ordinary object and its methods run. On the controller,
`controller/group.py` makes an instance of the same class that has a dispatcher instead of a state: there a call of a
marked method goes to every rank. Both are the same class, so go-to-definition and the type checker see one thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, get_type_hints, overload

from hybridflow.batch import Batch
from hybridflow.errors import ReturnError
from hybridflow.metrics import Metrics

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
W = TypeVar("W", bound="Dispatching")


PROMISES = (Batch, Metrics)
"""Results that callers work with. A method promises one by its annotation, or by that of the method which it overrides."""


def returned(result: object, kind: type[T], name: str) -> T:
    """`result` of the method `name`, which promises a `kind`.

    Raises:
        ReturnError: it is something else.
    """
    if isinstance(result, kind):
        return result
    found = "nothing: is a `return` missing" if result is None else f"{result!r:.80}, a {type(result).__name__}"
    raise ReturnError(f"{name} returns a {kind.__name__}; found {found}")


class Future(Protocol[R_co]):
    """The result of a call that may still be running."""

    def result(self, timeout_s: float | None = None) -> R_co:
        """Wait for the result. Raises the error of the first rank that failed."""
        ...

    def done(self) -> bool:
        """Whether `result` would return without waiting."""
        ...

    @property
    def later(self) -> R_co:
        """The future in the place of its result, to be passed to another group's call without waiting for it."""
        ...


class CombinedFuture(Generic[T, R]):
    """The results of several calls, made one by `combine` once all have come."""

    def __init__(self, futures: Sequence[Future[T]], combine: Callable[[list[T]], R]):
        self._futures, self._combine = futures, combine
        self._lock = threading.Lock()
        self._result: list[R] = []

    def result(self, timeout_s: float | None = None) -> R:
        """Wait for the calls one after the other, for `timeout_s` each. Raises the error of the first that failed."""
        with self._lock:
            if not self._result:
                self._result.append(self._combine([future.result(timeout_s) for future in self._futures]))
            return self._result[0]

    def done(self) -> bool:
        """Whether all calls have been answered."""
        return all(future.done() for future in self._futures)

    @property
    def later(self) -> R:
        """As of `Future`."""
        return cast(R, self)


class Dispatcher(Protocol):
    """Carries a call to the ranks of a group."""

    @property
    def pool_name(self) -> str:
        """Of the pool that the group runs on. The calls of all groups on one pool run one after the other."""
        ...

    @property
    def num_data_ranks(self) -> int:
        """Over how many ranks the rows of a call are spread."""
        ...

    @property
    def is_streaming(self) -> bool:
        """Whether calls of several collects are carried out together, each as its rows are done."""
        return False

    def start(self, method: str, protocol: str, /, *args: object, **kwargs: object) -> Future[object]:
        """Send the call; arguments may be futures of other calls."""
        ...


class Dispatching(Protocol):
    """An object that may stand for a group."""

    dispatcher: Dispatcher | None


class RemoteMethod(Generic[W, P, R]):
    """A marked method, as the class attribute that `@remote` leaves behind."""

    def __init__(self, function: Callable[Concatenate[W, P], R], protocol: str):
        self.function, self.protocol = function, protocol
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    @overload
    def __get__(self, worker: None, owner: type) -> RemoteMethod[W, P, R]: ...

    @overload
    def __get__(self, worker: W, owner: type) -> BoundMethod[P, R]: ...

    def __get__(self, worker: W | None, owner: type) -> RemoteMethod[W, P, R] | BoundMethod[P, R]:
        if worker is None:
            return self
        return BoundMethod(self, worker)


class BoundMethod(Generic[P, R]):
    """A marked method of one worker or one group."""

    def __init__(self, method: RemoteMethod[Any, P, R], worker: Dispatching):
        self.method, self.worker = method, worker

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """On a rank: run. On the controller: run on every rank and wait for the collected result."""
        if self.worker.dispatcher is None:
            return self.method.function(self.worker, *args, **kwargs)
        return self.start(*args, **kwargs).result()

    @property
    def start(self) -> Callable[P, Future[R]]:
        """Run on every rank without waiting. It is the dispatcher's own `start`: nothing lies between a call and its group."""
        dispatcher = self.worker.dispatcher
        assert dispatcher is not None, f"{self.method.__name__}.start is for groups; on a rank call it directly"
        return cast(Callable[P, Future[R]], partial(dispatcher.start, self.method.__name__, self.method.protocol))


def checked(result: R, worker_class: type, method: str) -> R:
    """`result` of a marked method, as it promises. Raises ReturnError."""
    methods = [vars(base)[method] for base in worker_class.__mro__ if method in vars(base)]
    promised = next((kind for each in methods if (kind := _promised(getattr(each, "function", each))) is not None), None)
    if promised is Batch or promised is Metrics:
        returned(result, promised, f"{worker_class.__name__}.{method}")
    return result


def _promised(function: FunctionType) -> object:
    """What a method's annotation says that it returns; None without one, or where its names are there for type checkers alone,
    as those of PROMISES are in modules of the package."""
    if "return" not in function.__annotations__:
        return None
    written = SimpleNamespace(__annotations__={"return": function.__annotations__["return"]})
    is_own = function.__module__.partition(".")[0] == __package__.partition(".")[0]
    names = {kind.__name__: kind for kind in PROMISES} if is_own else {}
    try:
        return get_type_hints(written, {**names, **function.__globals__})["return"]
    except (NameError, AttributeError, TypeError, SyntaxError):
        return None


def remote(protocol: str) -> Callable[[Callable[Concatenate[W, P], R]], RemoteMethod[W, P, R]]:
    """Mark a worker's method as callable on its group; `protocol` names how arguments and results travel.

    The names are in `hybridflow.registry.PROTOCOLS`; `my_package.module:Class` names one of your own.
    """

    def mark(function: Callable[Concatenate[W, P], R]) -> RemoteMethod[W, P, R]:
        return RemoteMethod(function, protocol)

    return mark
