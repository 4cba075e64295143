"""How ranks that share an engine agree on what happens before each of its steps."""

from __future__ import annotations

import pickle
from datetime import timedelta

import torch
import torch.distributed as dist

from hybridflow.parallel.layout import Layout
from hybridflow.rollout.step_thread import Agree, Decision

IDLE = timedelta(days=365)
"""A rank that follows waits as long as its engine has nothing to do."""


def lockstep(layout: Layout, rank: int, *, sends_requests: bool = False) -> Agree | None:
    """The first tensor rank decides and tells the others, in a gloo group of their own; None where engines have one rank each
    or one process does all. `sends_requests`: it tells them the requests too, since only it has any (EngineThread, `follows`).

    Every rank of the pool calls this at the same time.
    """
    if layout.tensor == 1 or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    first, own = rank, None
    for data_rank in range(layout.data):
        ranks = sorted((r for r in range(layout.num_ranks) if layout.data_rank(r) == data_rank), key=layout.tensor_rank)
        group = dist.new_group(ranks, backend="gloo", timeout=IDLE if sends_requests else None)
        if rank in ranks:
            first, own = ranks[0], group

    def agree(decision: Decision) -> Decision:
        said = pickle.dumps(decision.fresh) if sends_requests and decision.fresh else b""
        counts = decision.num_submissions, decision.num_interrupts, decision.is_closing, decision.num_pauses
        numbers = torch.tensor([*counts, decision.num_handed_out, len(said)])
        dist.broadcast(numbers, src=first, group=own)
        num_submissions, num_interrupts, is_closing, num_pauses, num_handed_out, num_bytes = numbers.tolist()
        fresh = ()
        if num_bytes:
            told = (
                torch.frombuffer(bytearray(said), dtype=torch.uint8)
                if rank == first
                else torch.empty(num_bytes, dtype=torch.uint8)
            )
            dist.broadcast(told, src=first, group=own)
            fresh = pickle.loads(told.numpy().tobytes())
        return Decision(num_submissions, num_interrupts, bool(is_closing), num_pauses, fresh, num_handed_out)

    return agree
