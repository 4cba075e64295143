"""A rank's rows cut into microbatches of a token budget, as many on every rank.

FSDP gathers weights with every rank taking part, so all ranks go through the same number of microbatches; a rank that
runs out of rows goes through a dummy row that has no response. R response tokens, B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from hybridflow.batch import Batch, Ragged
from hybridflow.data.balance import Rows, token_budget_parts
from hybridflow.models.packing import Indices, Packed, pack, to_device
from hybridflow.ops.reduce import Counts
from hybridflow.workers.base import RankContext


@dataclass(frozen=True)
class Microbatch:
    """Rows that go through the model at once."""

    rows: Rows
    """Of the rank's batch; none in a dummy."""
    packed: Packed
    lengths_B: Indices
    """Response tokens of each row."""


class Microbatches:
    """All rows of a batch, in parts of at most `tokens_per_microbatch` tokens for each rank that shares them."""

    def __init__(self, batch: Batch, context: RankContext, *, tokens_per_microbatch: int):
        self.batch, self.context = batch, context
        self.prompt, self.response = batch.tokens("prompt"), batch.tokens("response")
        tokens_B = self.prompt.lengths + self.response.lengths
        self.num_tokens = int(tokens_B.sum())
        """Prompt and response tokens of the rows that this rank, or those that share its rows, work on."""
        budget = tokens_per_microbatch * context.layout.sequence
        parts = token_budget_parts(tokens_B, budget)
        num_parts, self.counts = self._agree(len(parts))
        self.parts = parts if len(parts) == num_parts else token_budget_parts(tokens_B, budget, min_parts=num_parts)

    def _agree(self, num_parts: int) -> tuple[int, Counts]:
        """The largest number of parts of any rank, and what is counted over all ranks: one exchange of three numbers."""
        mine = [num_parts, len(self.response.values), int(np.count_nonzero(self.response.lengths))]
        ranks_NC = np.array([mine])
        if self.context.layout.num_ranks > 1:
            sent = torch.tensor(mine, device=self.context.device)
            received = [torch.empty_like(sent) for _ in range(self.context.layout.num_ranks)]
            dist.all_gather(received, sent, group=self.context.group)
            ranks_NC = torch.stack(received).cpu().numpy()
        tokens, rows = (ranks_NC[:, 1:].sum(0) // self.context.layout.sequence).tolist()
        return int(ranks_NC[:, 0].max()), Counts(tokens=tokens, rows=rows)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Microbatch]:
        layout = self.context.layout
        for rows in self.parts:
            prompt, response = (self.prompt.take(rows), self.response.take(rows)) if len(rows) else _dummy()
            packed = pack(
                prompt,
                response,
                self.context.device,
                sequence_rank=layout.sequence_rank(self.context.rank),
                sequence_size=layout.sequence,
            )
            yield Microbatch(rows, packed, response.lengths)

    def column(self, name: str, microbatch: Microbatch) -> torch.Tensor:
        """A column of the batch at each response token: shape [R], float32. A number per row is repeated.

        Raises:
            BatchError: the column is missing.
        """
        if name in self.batch.light:
            values_R = np.repeat(self.batch[name][microbatch.rows].astype(np.float32), microbatch.lengths_B)
        else:
            values_R = self.batch.tokens(name).take(microbatch.rows).values.astype(np.float32)
        return to_device(values_R, self.context.device)

    def gather_rows(self, values: Sequence[torch.Tensor]) -> Ragged:
        """Numbers at each response token, computed microbatch by microbatch, in the order of the batch's rows."""
        everything = torch.cat([part.float() for part in values]).cpu().numpy()
        rows = np.concatenate(self.parts)
        in_order = Ragged.from_lengths(everything, self.response.lengths[rows])
        return in_order.take(np.argsort(rows).astype(np.int32))


def _dummy() -> tuple[Ragged, Ragged]:
    return Ragged.from_rows([[0]], np.int32), Ragged.from_rows([[]], np.int32)
