"""The size of a pool, as written in `placement.pools`, and the CPU slots that this machine has for pools."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridflow.config.schema import Config
from hybridflow.errors import PlacementError

NVIDIA_DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")
"""The driver has one folder here for each GPU. Read instead of asking torch, whose import takes seconds."""

POOL = re.compile(r"\s*(\d+)\s*x\s*(\d+)(\s+cpu)?\s*")


@dataclass(frozen=True)
class PoolSize:
    """Nodes of a pool, ranks on each, and whether its ranks have CPU slots even where others have GPUs."""

    nodes: int
    ranks_per_node: int
    is_cpu: bool = False

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}{' cpu' if self.is_cpu else ''}"


def parse_pool(text: str) -> PoolSize:
    """The size that `text` describes: `2x8` is two nodes with eight ranks each, `1x4 cpu` the same with CPU slots.

    Example:
        >>> parse_pool("2x8"), parse_pool("1x4 cpu").num_ranks
        (PoolSize(nodes=2, ranks_per_node=8, is_cpu=False), 4)

    Raises:
        PlacementError: `text` is of neither form, or a count is zero.
    """
    match = POOL.fullmatch(text)
    if match is None:
        raise PlacementError(f"found {text!r}; needed: nodes x ranks per node, for example 2x8 or '1x4 cpu'")
    nodes, ranks, cpu = match.groups()
    if int(nodes) < 1 or int(ranks) < 1:
        raise PlacementError(f"found {text!r}; at least one node and one rank on each are needed")
    return PoolSize(int(nodes), int(ranks), cpu is not None)


def gpus_of_this_machine(environment: Mapping[str, str] = os.environ) -> int:
    """GPUs that a cluster started on this machine would have, found without torch."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return 0 if visible.strip() in ("", "-1", "NoDevFiles") else len(visible.split(","))
    return len(list(NVIDIA_DRIVER_FOLDER.iterdir())) if NVIDIA_DRIVER_FOLDER.is_dir() else 0


def cpu_slots_of_this_machine(asked: int | None) -> int:
    """CPU slots of a cluster started on this machine: `asked`, or its cores and at least 4."""
    return asked if asked is not None else max(os.cpu_count() or 1, 4)


def joins_a_cluster(config: Config) -> bool:
    """Whether ranks run where a cluster has room for them, and not on this machine necessarily."""
    return config.run.ray_address is not None or bool(os.environ.get("RAY_ADDRESS"))
