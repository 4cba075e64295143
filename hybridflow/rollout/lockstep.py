"""How ranks that share an engine agree on what happens before each of its steps."""

from __future__ import annotations

import torch
import torch.distributed as dist

from hybridflow.parallel.layout import Layout
from hybridflow.rollout.step_thread import Agree, Decision


def lockstep(layout: Layout, rank: int) -> Agree | None:
    """The first tensor rank decides and tells the others, in a gloo group of their own; None where engines have one rank each
    or one process does all.

    Every rank of the pool calls this at the same time.
    """
    if layout.tensor == 1 or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    first, own = rank, None
    for data_rank in range(layout.data):
        ranks = sorted((r for r in range(layout.num_ranks) if layout.data_rank(r) == data_rank), key=layout.tensor_rank)
        group = dist.new_group(ranks, backend="gloo")
        if rank in ranks:
            first, own = ranks[0], group

    def agree(decision: Decision) -> Decision:
        numbers = torch.tensor([decision.num_submissions, decision.num_interrupts, decision.is_closing])
        dist.broadcast(numbers, src=first, group=own)
        num_submissions, num_interrupts, is_closing = numbers.tolist()
        return Decision(num_submissions, num_interrupts, bool(is_closing))

    return agree
