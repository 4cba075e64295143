"""Many small kernels as one launch.

A sync copies and sums hundreds of tensors; launching that from Python takes several times what the GPU needs. Addresses
stay the same from sync to sync, so the launches are recorded in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

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
