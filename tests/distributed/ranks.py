"""Running a function on several gloo ranks of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hybridflow.parallel.mesh import init_process_group

R = TypeVar("R")
PRELOADED = ["torch", "transformers", "hybridflow.models.build", "hybridflow.checkpoint.sharded", "tests.training_rows"]
"""Imported once, in the process that ranks are forked from: imports take longer than most tests."""
PRELOADED_WITH_VLLM = [*PRELOADED, "hybridflow.rollout.vllm_engine"]
"""Where a test needs it: ten seconds for each process otherwise."""


def start(num_processes: int, function: Callable[..., None], *args: object) -> None:
    """Run `function(rank, *args)` in processes that are forked with their imports done; wait for them."""
    mp.start_processes(function, args, nprocs=num_processes, start_method="forkserver")


def on_ranks(num_ranks: int, function: Callable[..., R], *args: object) -> list[R]:
    """What `function(*args)` returns on each of `num_ranks` processes, which form one group. Both must pickle."""
    with tempfile.TemporaryDirectory() as folder:
        start(num_ranks, _run, num_ranks, folder, function, args)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(num_ranks)]


def _run(rank: int, num_ranks: int, folder: str, function: Callable[..., object], args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    init_process_group(
        rank=rank, world_size=num_ranks, rendezvous=f"file://{folder}/rendezvous", device=torch.device("cpu"), timeout_s=120
    )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
