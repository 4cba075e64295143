"""A rank's rows split into microbatches of a token budget, as many on every rank.

FSDP gathers weights with every rank taking part, so all ranks go through the same number of microbatches; a rank that
runs out of rows goes through a dummy row that has no response. R trained response tokens, B rows.

Response tokens that the policy did not sample (`loss_mask` 0) are context only. They end here: nothing behind this file sees
them, so that no reduction can count them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from hybridflow.batch import Batch, Ragged
from hybridflow.data.balance import Rows, divided, token_budget_parts
from hybridflow.models.packing import Indices, Packed, at_last_tokens, pack, to_device
from hybridflow.ops.reduce import Counts
from hybridflow.workers.base import RankContext

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Microbatch:
    """Rows that go through the model at once."""

    rows: Rows
    """Of the rank's batch; none in a dummy."""
    packed: Packed
    lengths_B: Indices
    """Trained response tokens of each row."""
    temperature: float | torch.Tensor
    """By which the rows were sampled: of all, or of each token that this rank predicts, shape [R of its share]."""


class Microbatches:
    """All rows of a batch, in parts of at most `tokens_per_microbatch` tokens for each rank that shares them.

    Rows without a column `temperature` have `default_temperature`. Rows with the same number in a column `pair` stay together.
    With `reads_rows` a row is read once, at its last token: whatever is said of response tokens holds for rows.
    """

    def __init__(
        self,
        batch: Batch,
        context: RankContext,
        *,
        tokens_per_microbatch: int,
        default_temperature: float = 1.0,
        reads_rows: bool = False,
    ):
        self.batch, self.context, self.default_temperature = batch, context, default_temperature
        self.reads_rows = reads_rows
        self.columns: dict[str, Ragged] = {}
        """Per-token columns that were read: from all shards of the batch, once for all microbatches."""
        self.prompt, self.response = batch.tokens("prompt"), batch.tokens("response")
        self.mask = batch.tokens("loss_mask") if "loss_mask" in batch and not reads_rows else None
        self.trained = self._trained()
        """The response tokens that the policy sampled; one for each row that is read at its end."""
        self.history_starts = batch.tokens("history_starts") if "history_starts" in batch else None
        tokens_B = self.prompt.lengths + self.response.lengths
        self.num_tokens = int(tokens_B.sum())
        """Prompt and response tokens of the rows that this rank, or those that share its rows, work on."""
        budget = tokens_per_microbatch * context.layout.sequence
        pairs = batch["pair"] if "pair" in batch.per_row else None
        parts = divided(tokens_B, partial(token_budget_parts, budget_tokens=budget), groups=pairs)
        num_parts, self.counts = self._agree(len(parts))
        at_least = partial(token_budget_parts, budget_tokens=budget, min_parts=num_parts)
        self.parts = parts if len(parts) == num_parts else divided(tokens_B, at_least, groups=pairs)

    def _trained(self) -> Ragged:
        if self.reads_rows:
            ones = np.ones(len(self.response), np.int64)
            return Ragged.from_lengths(np.zeros(len(ones), np.int32), ones)
        return self.response if self.mask is None else self.response.where(self.mask.values.astype(np.bool_))

    @property
    def num_trained_tokens(self) -> int:
        """Response tokens that the policy sampled, of the rows of this rank."""
        return len(self.trained.values)

    def _agree(self, num_parts: int) -> tuple[int, Counts]:
        """The largest number of parts of any rank, and what is counted over all ranks: one exchange of three numbers."""
        mine = [num_parts, len(self.trained.values), int(np.count_nonzero(self.trained.lengths))]
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
            trained = self.trained.take(rows) if len(rows) else response
            mask = self._mask(rows) if len(rows) else None
            if mask is not None and self.history_starts is not None:
                prompt, response, mask = split_at_histories(prompt, response, mask, self.history_starts.take(rows))
            packed = pack(
                prompt,
                response,
                self.context.device,
                mask=mask,
                sequence_rank=layout.sequence_rank(self.context.rank),
                sequence_size=layout.sequence,
            )
            if self.reads_rows and len(rows):
                ranks = {"sequence_rank": layout.sequence_rank(self.context.rank), "sequence_size": layout.sequence}
                packed = at_last_tokens(packed, len(rows), **ranks)
            yield Microbatch(rows, packed, trained.lengths, self._temperature(rows, packed, trained.lengths))

    def _mask(self, rows: Rows) -> Mask | None:
        return None if self.mask is None else self.mask.take(rows).values.astype(np.bool_)

    def _temperature(self, rows: Rows, packed: Packed, lengths_B: Indices) -> float | torch.Tensor:
        """One number where all rows have the same; greedy rows train the distribution as it is."""
        if "temperature" not in self.batch or not len(rows):
            return self.default_temperature
        sampled_B = self.batch["temperature"][rows]
        divisor_B = np.where(sampled_B == 0, 1.0, sampled_B)
        if len(divisor_B) and (divisor_B == divisor_B[0]).all():
            return float(divisor_B[0])
        number = self.context.layout.sequence_rank(self.context.rank)
        first = sum(packed.rank_sizes[:number])
        own_R = np.repeat(divisor_B, lengths_B)[first : first + packed.rank_sizes[number]]
        return to_device(own_R.astype(np.float32), self.context.device)

    def column(self, name: str, microbatch: Microbatch) -> torch.Tensor:
        """A column of the batch at each trained response token: shape [R], float32. A number per row is repeated.

        Raises:
            BatchError: the column is missing.
        """
        rows = microbatch.rows
        if name in self.batch.per_row:
            values_R = np.repeat(self.batch[name][rows].astype(np.float32), microbatch.lengths_B)
        else:
            if name not in self.columns:
                self.columns[name] = self.batch.tokens(name)
            values_R = self.columns[name].take(rows).values.astype(np.float32)
            values_R = values_R if self.mask is None else values_R[self._mask(rows)]
        return to_device(values_R, self.context.device)

    def gather_rows(self, values: Sequence[torch.Tensor]) -> Ragged:
        """Numbers at each trained response token, computed microbatch by microbatch, in the order of the batch's rows, with 0
        at the response tokens that are not trained."""
        everything = torch.cat([part.float() for part in values]).cpu().numpy()
        rows = np.concatenate(self.parts)
        in_order = Ragged.from_lengths(everything, self.trained.lengths[rows]).take(np.argsort(rows).astype(np.int32))
        return in_order if self.mask is None else in_order.spread(self.mask.values.astype(np.bool_), self.response.offsets)


def split_at_histories(prompt: Ragged, response: Ragged, mask: Mask, starts: Ragged) -> tuple[Ragged, Ragged, Mask]:
    """Rows of which each sees one history: where a response has others (numbers of its tokens, of which none was sampled), the
    rest of it is a row behind, whose prompt is its first token. Trained tokens stay in their order.

    Example: the prompt [1, 2] with the response [3, 4, 5, 6] and a start at 2 become the prompts [1, 2] and [5] with the
    responses [3, 4] and [6].
    """
    if not len(starts.values):
        return prompt, response, mask
    prompts, responses, masks = [], [], []
    for before, tokens, sampled, inner in zip(prompt, response, Ragged(mask, response.offsets), starts, strict=True):
        edges = [*inner.tolist(), len(tokens)]
        prompts += [before, *(tokens[begin : begin + 1] for begin in inner)]
        responses += [tokens[: edges[0]], *(tokens[begin + 1 : end] for begin, end in pairwise(edges))]
        masks += [sampled[: edges[0]], *(sampled[begin + 1 : end] for begin, end in pairwise(edges))]
    return Ragged.from_rows(prompts, np.int32), Ragged.from_rows(responses, np.int32), np.concatenate(masks)


def _dummy() -> tuple[Ragged, Ragged]:
    return Ragged.from_rows([[0]], np.int32), Ragged.from_rows([[]], np.int32)
