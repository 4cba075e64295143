"""Prompts from Parquet files: read, wrapped in the chat template, tokenised, and filtered by length."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from hybridflow.batch import Array, Ragged, ShardColumn
from hybridflow.config.schema import DataConfig
from hybridflow.data.chat import Message
from hybridflow.data.chunks import PROMPT_TEXT, Chunk, ChunkReader, conversation
from hybridflow.data.conversations import TEMPLATE_COLUMNS
from hybridflow.data.parquet import (
    ROWS_PER_READ,
    ColumnSpec,
    StoredColumn,
    has_fields,
    is_integer,
    is_messages,
    is_text,
    open_parquet,
    warn_of_unread,
)
from hybridflow.data.progress import Progress
from hybridflow.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPT = ColumnSpec(
    name="prompt",
    expected="a string, or a list of structs with the strings role and content",
    fits=lambda kind: is_text(kind) or is_messages(kind),
)
GROUND_TRUTH = ColumnSpec(
    name="reward_model",
    expected="a struct with the field ground_truth",
    fits=lambda kind: has_fields(kind, "ground_truth"),
    field="ground_truth",
)
DATA_SOURCE = ColumnSpec(name="data_source", expected="a string", fits=is_text)
EXTRA_INFO = ColumnSpec(name="extra_info", expected="a struct", fits=has_fields, is_required=False)
MAX_RESPONSE_TOKENS = ColumnSpec(name="max_response_tokens", expected="an integer", fits=is_integer, is_required=False)
PROMPT_COLUMNS = (PROMPT, GROUND_TRUTH, DATA_SOURCE, EXTRA_INFO, MAX_RESPONSE_TOKENS, *TEMPLATE_COLUMNS)
EPISODE_COLUMNS = (
    PROMPT,
    replace(GROUND_TRUTH, is_required=False),
    replace(DATA_SOURCE, is_required=False),
    EXTRA_INFO,
    MAX_RESPONSE_TOKENS,
    *TEMPLATE_COLUMNS,
)
"""An environment may know by itself what is right."""


@dataclass(frozen=True, kw_only=True)
class PromptSummary:
    """What became of the rows of the files."""

    num_files: int
    num_rows: int
    num_overlong: int
    """Rows over `data.max_prompt_tokens`: dropped, or truncated."""
    num_kept: int
    max_prompt_tokens: int
    """As of `data`."""
    shortest_tokens: int
    """Before dropping and truncating, as is `longest_tokens`."""
    longest_tokens: int

    def __str__(self) -> str:
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        if not self.num_overlong:
            return f"{self.num_kept:,} prompts from {files}, of {self.shortest_tokens:,} to {self.longest_tokens:,} tokens"
        fate = "dropped" if self.num_kept < self.num_rows else "truncated"
        return (
            f"{self.num_kept:,} prompts from {files}; {self.num_overlong:,} of {self.num_rows:,} rows over "
            f"data.max_prompt_tokens={self.max_prompt_tokens} were {fate}, the longest has {self.longest_tokens:,} tokens"
        )


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts; texts and everything else stay in Arrow until drawn."""

    tokens: Ragged
    """Token ids, int32."""
    row_numbers: npt.NDArray[np.int64]
    """Shape [N]: of each prompt in the files laid end to end, dropped rows counted."""
    stored: Mapping[str, StoredColumn]
    """`prompt_text` and the other columns of the files."""
    rows_per_file: tuple[int, ...]
    """Prompts kept of each file."""
    summary: PromptSummary
    limits: npt.NDArray[np.int64] | None = None
    """Most response tokens of each prompt; None where the files have no such column."""

    def __len__(self) -> int:
        return len(self.row_numbers)

    def rows_of(self, prompt_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows that have these `prompt_id`s."""
        return np.searchsorted(self.row_numbers, prompt_ids)

    def ground_truths(self) -> Iterator[tuple[int, object, str]]:
        """Number of the row in the files laid end to end, ground truth and data source of each prompt."""
        for first in range(0, len(self), ROWS_PER_READ):
            rows = np.arange(first, min(first + ROWS_PER_READ, len(self)))
            truths, sources = (
                self.stored["reward_model"].take_field("ground_truth", rows),
                self.stored["data_source"].take(rows),
            )
            yield from zip(self.row_numbers[rows].tolist(), truths, map(str, sources), strict=True)

    def columns(self, rows: npt.NDArray[np.int64]) -> dict[str, Array | ShardColumn]:
        """The batch columns that the files determine, for the given rows."""
        tokens = self.tokens.take(rows.astype(np.int32))
        limits = {} if self.limits is None else {"max_response_tokens": self.limits[rows]}
        return {
            **limits,
            "prompt": tokens,
            "prompt_text": self.stored[PROMPT_TEXT].take(rows),
            "messages": [conversation(cast("str | list[Message]", prompt)) for prompt in self.stored[PROMPT.name].take(rows)],
            "ground_truth": self.stored["reward_model"].take_field("ground_truth", rows),
            "data_source": self.stored["data_source"].take(rows),
            "extra_info": [info or {} for info in self.stored["extra_info"].take(rows)],
            "prompt_tokens": tokens.lengths,
            "prompt_id": self.row_numbers[rows],
        }


def read_prompts(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: DataConfig,
    key: str = "data.train_files",
    columns: Sequence[ColumnSpec] = PROMPT_COLUMNS,
    max_prompts: int | None = None,
) -> Prompts:
    """The prompts of Parquet files, in file order; `max_prompts` keeps only the first so many.

    `key` is the configuration key that names the files, for messages. What was dropped is logged and in `summary`.

    Raises:
        DataError: a file or column is missing or malformed, or no prompt is left.
    """
    opened = [open_parquet(path, columns, key=key) for path in files]
    reader = ChunkReader(tokenizer, data, columns)
    room = max_prompts
    chunks: list[list[Chunk]] = []
    with Progress("reading and tokenising prompts", sum(file.metadata.num_rows for file in opened)) as progress:
        for path, file in zip(files, opened, strict=True):
            warn_of_unread(file, columns, where=f"{key}: {path}")
            chunks.append([])
            for chunk in reader.chunks(file, where=f"{key}: {path}", max_prompts=room):
                progress.advance(chunk.num_rows)
                chunks[-1].append(chunk)
                room = None if room is None else room - len(chunk)
    prompts = _assemble(chunks, [spec.name for spec in columns], data.max_prompt_tokens)
    if not len(prompts):
        raise DataError(f"{key}: {_nothing_left(prompts.summary)}")
    logger.info("%s: %s", key, prompts.summary)
    return prompts


def _nothing_left(summary: PromptSummary) -> str:
    if not summary.num_rows:
        return "the files have no rows"
    return (
        f"0 of {summary.num_rows} prompts are within data.max_prompt_tokens={summary.max_prompt_tokens}; "
        f"the shortest has {summary.shortest_tokens} tokens. Raise data.max_prompt_tokens, or set "
        "data.overlong_prompts=truncate_left"
    )


def _limits(stored: StoredColumn, num_rows: int) -> npt.NDArray[np.int64] | None:
    """A row without a limit of its own has that of `data.max_response_tokens`.

    Raises:
        DataError: a limit is below 1.
    """
    given = stored.take(np.arange(num_rows))
    if all(limit is None for limit in given):
        return None
    limits = np.array([np.iinfo(np.int64).max if limit is None else int(str(limit)) for limit in given], np.int64)
    if limits.min() < 1:
        raise DataError(f"column {MAX_RESPONSE_TOKENS.name!r} holds {limits.min()}; a response has at least 1 token")
    return limits


def _assemble(chunks: Sequence[Sequence[Chunk]], stored: Sequence[str], max_prompt_tokens: int) -> Prompts:
    """One table from the chunks of each file."""
    flat = list(chain(*chunks))
    starts = np.cumsum([0, *(chunk.num_rows for chunk in flat)])
    summary = PromptSummary(
        num_files=len(chunks),
        num_rows=int(starts[-1]),
        num_overlong=sum(chunk.num_overlong for chunk in flat),
        num_kept=sum(map(len, flat)),
        max_prompt_tokens=max_prompt_tokens,
        shortest_tokens=min((chunk.shortest_tokens for chunk in flat), default=0),
        longest_tokens=max((chunk.longest_tokens for chunk in flat), default=0),
    )
    no_rows = np.empty(0, np.int64)
    columns = {name: StoredColumn([chunk.stored[name] for chunk in flat]) for name in (PROMPT_TEXT, *stored)}
    limits = columns.get(MAX_RESPONSE_TOKENS.name)  # not of files with responses
    return Prompts(
        limits=None if limits is None else _limits(limits, sum(map(len, flat))),
        tokens=Ragged.from_lengths(
            np.concatenate([chunk.tokens.values for chunk in flat] or [no_rows.astype(np.int32)]),
            np.concatenate([chunk.tokens.lengths for chunk in flat] or [no_rows]),
        ),
        row_numbers=np.concatenate([start + chunk.rows for start, chunk in zip(starts, flat, strict=False)] or [no_rows]),
        stored=columns,
        rows_per_file=tuple(sum(map(len, of_file)) for of_file in chunks),
        summary=summary,
    )
