"""Many small kernels as one launch.

A sync copies and sums hundreds of tensors; launching that from Python takes several times what the GPU needs. Addresses
stay the same from sync to sync, so the launches are recorded in a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Replay:
    """Work that does nothing but launch kernels on tensors at fixed addresses."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._addresses: tuple[int, ...] = ()

    def run(self, work: Callable[[], None], tensors: Sequence[torch.Tensor]) -> None:
        """Do `work`, whose inputs and outputs are `tensors`: as it is for the first time and whenever an address has
        changed, recorded the second time, and replayed from then on. On the CPU always as it is."""
        if not tensors or not tensors[0].is_cuda:
            work()
            return
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self._addresses:
            self._addresses, self._graph = addresses, None
            work()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Recording executes nothing; other threads of the process may use the device meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                work()
        self._graph.replay()
