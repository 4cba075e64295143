"""Rows laid end to end without padding, as the models of this package read them.

T tokens of all rows, R trained response tokens of all rows, B rows. A causal model's output at a position belongs to the token
after it, so a response token is predicted, and valued, at the position before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from hybridflow.batch import Ragged
from hybridflow.errors import BatchError

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Bucket:
    """Rows of similar length, as a part of the padded sequence."""

    num_rows: int
    longest: int
    """Tokens of each row after padding."""


@dataclass(frozen=True)
class Padding:
    """The packed sequence rearranged into buckets that are padded on the right. P tokens with padding."""

    buckets: tuple[Bucket, ...]
    source_P: torch.Tensor
    """For each padded token the packed one that it shows; padding shows its row's first token."""
    place_T: torch.Tensor
    """For each packed token its place among the padded ones."""


@dataclass(frozen=True)
class RowSpans:
    """Where rows begin and end in the packed sequence; what packed attention needs to know.

    Example: rows of 3, 1 and 2 tokens have `cu_seqlens_B1` [0, 3, 4, 6], `lengths_B` [3, 1, 2] and `max_seqlen` 3.
    """

    cu_seqlens_B1: torch.Tensor
    """Cumulative lengths, from 0 to T: shape [B + 1], int32, on the model's device."""
    lengths_B: Indices
    """Tokens of each row, on the host."""
    max_seqlen: int
    """Of the longest row."""

    @staticmethod
    def of_lengths(lengths_B: Indices, device: torch.device) -> RowSpans:
        """Spans of consecutive rows of the given lengths.

        Example:
            >>> RowSpans.of_lengths(np.array([3, 1, 2]), torch.device('cpu')).cu_seqlens_B1
            tensor([0, 3, 4, 6], dtype=torch.int32)
        """
        cu_seqlens_B1 = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int32)
        return RowSpans(to_device(cu_seqlens_B1, device), lengths_B, int(lengths_B.max(initial=0)))

    @cached_property
    def padding(self) -> Padding:
        """For attention without a kernel for packed rows; the same for all layers of a forward pass."""
        device = self.cu_seqlens_B1.device
        starts_B = np.cumsum(self.lengths_B) - self.lengths_B
        buckets, sources, paddings = [], [], []
        for rows, longest in _similar_lengths(self.lengths_B):
            column_L = np.arange(longest)[None]
            is_token_BL = column_L < self.lengths_B[rows][:, None]
            sources.append((starts_B[rows][:, None] + np.where(is_token_BL, column_L, 0)).reshape(-1))
            paddings.append(~is_token_BL.reshape(-1))
            buckets.append(Bucket(len(rows), longest))
        source_P, is_padding_P = np.concatenate(sources), np.concatenate(paddings)
        place_T = np.empty(int(self.lengths_B.sum()), np.int64)
        place_T[source_P[~is_padding_P]] = np.flatnonzero(~is_padding_P)
        return Padding(tuple(buckets), to_device(source_P, device), to_device(place_T, device))


def _similar_lengths(lengths_B: Indices) -> Iterator[tuple[Indices, int]]:
    """Rows in groups of similar length, with the longest length of each group; rows without tokens are left out.

    A group spans lengths within a factor of 1.25 or 16 tokens: little padding, and few groups.
    """
    order = np.argsort(lengths_B, kind="stable")
    ascending = lengths_B[order]
    start = int(np.searchsorted(ascending, 0, side="right"))
    while start < len(order):
        longest_allowed = max(int(ascending[start] * 1.25), int(ascending[start]) + 16)
        stop = int(np.searchsorted(ascending, longest_allowed, side="right"))
        yield order[start:stop], int(ascending[stop - 1])
        start = stop


@dataclass(frozen=True)
class Packed:
    """Rows in one sequence, or the tokens of it that one sequence rank has, and where their responses are predicted."""

    input_ids_1T: torch.Tensor
    """Shape [1, T], int64; of one of several sequence ranks, its tokens only, and likewise below."""
    position_ids_1T: torch.Tensor
    """Counting from 0 in each row: shape [1, T], int64."""
    spans: RowSpans
    """Always of the whole sequence."""
    predicting_R: torch.Tensor
    """Positions before each trained response token, rising: shape [R], int64."""
    targets_R: torch.Tensor
    """The trained response tokens: shape [R], int64."""
    rank_sizes: tuple[int, ...]
    """Trained response tokens that each sequence rank predicts."""


def pack(
    prompt: Ragged,
    response: Ragged,
    device: torch.device,
    *,
    mask: Mask | None = None,
    sequence_rank: int = 0,
    sequence_size: int = 1,
) -> Packed:
    """Each row's prompt followed by its response, one row after the other. Responses may be empty.

    Of the response tokens those are trained, that is predicted, where `mask` (one entry for each, all rows end to end) is
    true; all of them without. The others are context for those behind them and nothing else.

    With `sequence_size` above 1 the sequence is split into as many equal runs of tokens, of which that of `sequence_rank` is
    returned; a last row of padding makes the length divisible.

    Example: prompts [[1, 2], [4]] with responses [[3], [5, 6]] on one rank give

        input_ids_1T     [[1, 2, 3, 4, 5, 6]]
        position_ids_1T  [[0, 1, 2, 0, 1, 2]]
        cu_seqlens_B1    [0, 3, 6]
        predicting_R     [1, 3, 4]      the positions of 2, 4 and 5, which predict
        targets_R        [3, 5, 6]

    and with `sequence_size=2`, on `sequence_rank=1`, input_ids_1T [[4, 5, 6]], predicting_R [0, 1] and rank_sizes (1, 2).

    Raises:
        BatchError: a prompt is empty, so nothing predicts the first token of its response.
    """
    if len(empty := np.flatnonzero(prompt.lengths == 0)):
        raise BatchError(f"row {empty[0]} of {len(prompt)} has a prompt without tokens; a prompt needs at least one")
    lengths_B = prompt.lengths + response.lengths
    if excess := int(lengths_B.sum()) % sequence_size:
        lengths_B = np.append(lengths_B, sequence_size - excess)
    starts_B = np.cumsum(lengths_B) - lengths_B
    rows = slice(0, len(prompt))
    prompt_at = np.arange(len(prompt.values)) + np.repeat(starts_B[rows] - prompt.offsets[:-1], prompt.lengths)
    response_starts = starts_B[rows] + prompt.lengths - response.offsets[:-1]
    response_at = np.arange(len(response.values)) + np.repeat(response_starts, response.lengths)
    trained_at = response_at if mask is None else response_at[mask]
    tokens_T = np.zeros(int(lengths_B.sum()), np.int64)
    tokens_T[prompt_at] = prompt.values
    tokens_T[response_at] = response.values
    positions_T = np.arange(len(tokens_T)) - np.repeat(starts_B, lengths_B)

    rank_tokens = len(tokens_T) // sequence_size
    bounds = np.searchsorted(trained_at - 1, np.arange(sequence_size + 1) * rank_tokens)
    tokens = slice(sequence_rank * rank_tokens, (sequence_rank + 1) * rank_tokens)
    predicting = trained_at[bounds[sequence_rank] : bounds[sequence_rank + 1]] - 1
    return Packed(
        input_ids_1T=to_device(tokens_T[tokens], device)[None],
        position_ids_1T=to_device(positions_T[tokens], device)[None],
        spans=RowSpans.of_lengths(lengths_B, device),
        predicting_R=to_device(predicting - tokens.start, device),
        targets_R=to_device(tokens_T[predicting + 1], device),
        rank_sizes=tuple(np.diff(bounds).tolist()),
    )


def at_last_tokens(packed: Packed, num_rows: int, *, sequence_rank: int = 0, sequence_size: int = 1) -> Packed:
    """The same rows, each read once, at its last token, in place of before its response tokens.

    Example: of prompts [[1, 2], [4]] with responses [[3], [5, 6]], `predicting_R` becomes [2, 5]: the positions of 3 and 6.
    Nothing is predicted, so `targets_R` is without meaning.
    """
    last_B = np.cumsum(packed.spans.lengths_B)[:num_rows] - 1
    rank_tokens = packed.input_ids_1T.shape[1]
    bounds = np.searchsorted(last_B, np.arange(sequence_size + 1) * rank_tokens)
    own = last_B[bounds[sequence_rank] : bounds[sequence_rank + 1]] - sequence_rank * rank_tokens
    device = packed.input_ids_1T.device
    return replace(
        packed,
        predicting_R=to_device(own, device),
        targets_R=to_device(np.zeros(len(own), np.int64), device),
        rank_sizes=tuple(np.diff(bounds).tolist()),
    )


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """The array as a tensor on `device`; the host does not wait for the copy. The array must be writable."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
