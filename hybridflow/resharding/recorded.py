"""Many small kernels as one launch, and the engine's own loading without its Python: recorded once, replayed from then on.

A sync copies and sums hundreds of tensors; launching that from Python takes several times what the GPU needs. Addresses
stay the same from sync to sync, so the launches are recorded in a CUDA graph and replayed.

An engine's loader copies hundreds of small tensors, and finding out where each goes takes it several times as long as the
copies. Buckets and parameters stay where they are, so the copies of the second sync are recorded in CUDA graphs. The first
one is watched: a loader that does more than launch copies on the device is never recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow.rollout.base import Engine

logger = logging.getLogger("hybridflow")

_pool = cache(torch.cuda.graph_pool_handle)
"""The memory that all recordings of this process share: they run one after the other, and none leaves results there."""


def recording_into(graph: torch.cuda.CUDAGraph) -> torch.cuda.graph:
    """A block in which launches are recorded and not made. Other threads of the process may use the device meanwhile."""
    return torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local")


class Replay:
    """Work that does nothing but launch kernels on tensors at fixed addresses."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: tuple[int, ...] = ()

    def run(self, work: Callable[[], None], tensors: Sequence[torch.Tensor]) -> None:
        """Do `work`, whose inputs and outputs are `tensors`: as it is for the first time and whenever an address has
        changed, recorded the second time, and replayed from then on. Always as it is where a tensor lies in CPU memory."""
        if not tensors or not all(tensor.is_cuda for tensor in tensors):
            work()
            return
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._addresses:
            self._addresses, self._graph = addresses, None
            work()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with recording_into(self._graph):
                work()
        self._graph.replay()


class CudaRecording:
    """Launches that can be made again: a CUDA graph whose recording spans the turns of a generator."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._context = recording_into(self._graph)
        self._stream = torch.cuda.current_stream()

    def begin(self) -> None:
        self._context.__enter__()

    def end(self) -> None:
        self._context.__exit__(None, None, None)

    def abort(self) -> None:
        """Leave a recording that failed."""
        try:
            self.end()
        except RuntimeError:  # what made the recording fail is known already
            torch.cuda.set_stream(self._stream)

    def replay(self) -> None:
        """Make the launches."""
        self._graph.replay()


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that no recording can hold: what waits for the device, and what touches the CPU's memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.obstacle = ""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call it, and note it where it is an obstacle."""
        kwargs = kwargs or {}
        devices = {value.device.type for value in args if isinstance(value, torch.Tensor)}
        devices |= {torch.device(kwargs["device"]).type} if kwargs.get("device") is not None else set()
        if func in _WAITS or len(devices) > 1:
            self.obstacle = self.obstacle or str(func)
        return func(*args, **kwargs)


_WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Loads:
    """The loads of one engine."""

    def __init__(self, num_buckets: int, new_recording: Callable[[], CudaRecording] | None):
        """Without `new_recording` nothing is recorded."""
        self._num_buckets, self.new_recording = num_buckets, new_recording
        self.recordings: list[CudaRecording] = []
        self._current: CudaRecording | None = None
        self._addresses: tuple[int, ...] = ()
        self._is_watched = False

    def are_recorded(self, target: Engine) -> bool:
        """Whether replaying does what the engine's loading would: its weights are where they were recorded."""
        if len(self.recordings) < self._num_buckets:
            return False
        if self._addresses == _addresses(target):
            return True
        self.recordings.clear()
        return False

    def run(self, target: Engine, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Have the engine load, and watch or record that. `tensors` calls `begin` and `end` around each bucket."""
        if self.new_recording is None or not self._is_watched:
            watch = Watch()
            with nullcontext() if self.new_recording is None else watch:
                target.load_weights(tensors)
            self._is_watched = True
            if watch.obstacle:
                self.new_recording = None
                logger.info("the engine's loading is not recorded, since it calls %s", watch.obstacle)
            return
        self.recordings.clear()  # a load that failed has left those of its first buckets
        self._addresses = _addresses(target)
        try:
            target.load_weights(tensors)
        finally:
            if self._current is not None:  # it failed within a bucket
                self._current.abort()
                self._current = None

    def begin(self) -> None:
        """The engine is about to be given the tensors of a bucket."""
        if self.new_recording is not None and self._is_watched:
            self._current = self.new_recording()
            self._current.begin()

    def end(self) -> None:
        """The engine has copied them."""
        if self._current is not None:
            self._current.end()
            self._current.replay()
            self.recordings.append(self._current)
            self._current = None


def _addresses(target: Engine) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for _, tensor in target.named_parameters())
