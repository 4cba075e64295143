"""The size of a pool, as written in `placement.pools`: `2x8`, or `1x4 cpu`."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SIZE = re.compile(r"(\d+)\s*x\s*(\d+)(\s+cpu)?")


@dataclass(frozen=True)
class PoolSize:
    """How many ranks a pool has, and what each needs."""

    nodes: int
    ranks_per_node: int
    is_cpu: bool
    """Ranks take a CPU slot even where the run computes on GPUs."""

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def parse_pool(text: str) -> PoolSize:
    """`nodes x ranks per node`, with ` cpu` behind it for ranks without a GPU.

    Raises:
        ValueError: `text` is not of this form, or a number is zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match or "0" in (match[1], match[2]):
        raise ValueError(f"found {text!r}; write nodes x ranks per node, for example 1x8, or 1x2 cpu for ranks without a GPU")
    return PoolSize(int(match[1]), int(match[2]), match[3] is not None)
