"""Dividing rows so that every part has about the same number of tokens."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Lengths = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int32]


def balanced_parts(lengths: Lengths, num_parts: int) -> list[Rows]:
    """The rows of each of `num_parts` parts, ascending within a part.

    `lengths` has shape [B], in tokens. Longest row first, each to the part that has the fewest tokens so far (Graham 1969:
    the largest part is at most 4/3 of the best possible). Rows of equal length are dealt out evenly, in
    runs. Deterministic. Parts are empty only where there are fewer rows than parts.

    >>> [part.tolist() for part in balanced_parts(np.array([5, 9, 3, 3, 8]), 2)]  # 15 and 13 tokens
    [[1, 2, 3], [0, 4]]
    """
    assert num_parts >= 1, f"rows cannot be divided into {num_parts} parts"
    part_of = np.zeros(len(lengths), np.int32)
    # (tokens, rows, part): the number of rows breaks ties, so that rows without tokens spread too.
    heap = [(0, 0, part) for part in range(num_parts)]
    for row in _longest_first(lengths):
        tokens, count, part = heap[0]
        part_of[row] = part
        heapq.heapreplace(heap, (tokens + int(lengths[row]), count + 1, part))
    part_of = _in_runs(part_of, lengths)
    return [np.flatnonzero(part_of == part).astype(np.int32) for part in range(num_parts)]


def divided(
    lengths: Lengths, divide: Callable[[Lengths], list[Rows]], *, groups: npt.NDArray[np.integer] | None = None
) -> list[Rows]:
    """What `divide` makes of the rows; with `groups`, one number per row, rows of the same number come into the same part.

    >>> def halves(lengths: Lengths) -> list[Rows]:
    ...     return balanced_parts(lengths, 2)
    >>> [part.tolist() for part in divided(np.array([5, 1, 2, 2]), halves, groups=np.array([7, 7, 3, 3]))]
    [[0, 1], [2, 3]]
    """
    if groups is None:
        return divide(lengths)
    _, of_row = np.unique(groups, return_inverse=True)
    parts = divide(np.bincount(of_row, weights=lengths).astype(np.int64))
    return [np.flatnonzero(np.isin(of_row, part)).astype(np.int32) for part in parts]


def _in_runs(part_of: Rows, lengths: Lengths) -> Rows:
    """The same sums with neighbours kept together: among rows of equal length, the first go to the first part.

    Neighbouring rows are read from a shard without copying them one by one.
    """
    by_length = np.argsort(lengths, kind="stable")
    in_runs = np.empty_like(part_of)
    in_runs[by_length] = part_of[np.lexsort((part_of, lengths))]
    return in_runs


def token_budget_parts(lengths: Lengths, budget_tokens: int, *, min_parts: int = 1) -> list[Rows]:
    """Few parts of at most `budget_tokens` tokens each, balanced among themselves; a longer row is a part of its own.

    At least `min_parts` are returned, some of them empty where rows are too few: ranks that must go through the same number
    of microbatches agree on the largest number first. Deterministic; 10,000 rows take some 20 ms.

    >>> [part.tolist() for part in token_budget_parts(np.array([5, 90, 3, 3, 8]), 10)]  # 90, 8, 5 and 6 tokens
    [[1], [4], [0], [2, 3]]
    """
    assert budget_tokens >= 1, f"a part cannot have {budget_tokens} tokens"
    alone = [np.array([row], np.int32) for row in np.flatnonzero(lengths > budget_tokens)]
    rest = np.flatnonzero(lengths <= budget_tokens)
    packed = _best_fit(lengths[rest], budget_tokens)
    num_parts = max(len(packed), min_parts - len(alone))
    if num_parts <= 0:
        return alone
    balanced = balanced_parts(lengths[rest], num_parts)
    if max(int(lengths[rest[part]].sum()) for part in balanced) > budget_tokens:
        balanced = packed + [np.empty(0, np.int32)] * (num_parts - len(packed))
    return alone + [rest[part].astype(np.int32) for part in balanced]


def _best_fit(lengths: Lengths, budget_tokens: int) -> list[Rows]:
    """Longest row first, each into the fullest part that still has room: few parts, not balanced."""
    parts: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, part), sorted
    for row in _longest_first(lengths):
        tokens = int(lengths[row])
        at = bisect.bisect_left(room, (tokens, 0))
        if at == len(room):
            parts.append([row])
            bisect.insort(room, (budget_tokens - tokens, len(parts) - 1))
            continue
        left, part = room.pop(at)
        parts[part].append(row)
        bisect.insort(room, (left - tokens, part))
    return [_ascending(part) for part in parts]


def _longest_first(lengths: Lengths) -> Iterable[int]:
    order: list[int] = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    return order


def _ascending(rows: list[int]) -> Rows:
    return np.array(sorted(rows), np.int32)
