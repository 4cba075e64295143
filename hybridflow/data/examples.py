"""Rows of a dataset that a model learns from as they are: conversations, and pairs of a chosen and a rejected response."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hybridflow.batch import Array, Ragged, ShardColumn
from hybridflow.config.schema import DataConfig
from hybridflow.data.parquet import ColumnSpec, open_parquet, read_batches, warn_of_unread, without_nulls
from hybridflow.data.progress import Progress
from hybridflow.errors import DataError

logger = logging.getLogger(__name__)

PROBLEMS_SHOWN = 5
"""Rows that a message names; the others are counted."""


class BadRowError(Exception):
    """A row is malformed: the file is to be repaired."""


class UselessRowError(Exception):
    """Nothing can be learned from a row; it is left out and counted."""


@dataclass(frozen=True)
class Example:
    """A prompt with a response in tokens."""

    prompt: list[int]
    response: list[int]
    mask: list[bool]
    """Of each response token: whether it is learned."""
    prompt_text: str
    response_text: str
    is_truncated: bool = False


Row = Mapping[str, object]
MakeExamples = Callable[[Row], Sequence[Example]]
"""The examples of one row, always as many. Raises BadRowError or UselessRowError."""


@dataclass
class Findings:
    """What was wrong with the rows of a file."""

    where: str
    num_rows: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    """Row -> why it is malformed."""
    useless: dict[int, str] = field(default_factory=dict)
    """Row -> why nothing can be learned from it."""

    def examples(self, row: Row, make: MakeExamples) -> Sequence[Example]:
        """What `make` gives for the next row; nothing where that is no use, which is noted."""
        number, self.num_rows = self.num_rows, self.num_rows + 1
        try:
            return make(row)
        except BadRowError as error:
            self.bad[number] = str(error)
        except UselessRowError as error:
            self.useless[number] = str(error)
        return ()

    def tell(self) -> None:
        """Log what is left out.

        Raises:
            DataError: rows are malformed.
        """
        if self.bad:
            shown = [f"row {number}: {problem}" for number, problem in list(self.bad.items())[:PROBLEMS_SHOWN]]
            more = f"; and {len(self.bad) - len(shown)} more" if len(self.bad) > len(shown) else ""
            raise DataError(
                f"{self.where}: {len(self.bad)} of {self.num_rows} rows are malformed: {'; '.join(shown)}{more}. "
                "python -m hybridflow.data check FILE lists all of them"
            )
        first = {problem: number for number, problem in reversed(self.useless.items())}
        for problem, count in Counter(self.useless.values()).items():
            logger.warning(
                "%s: %d of %d rows are left out: %s; the first is row %d",
                self.where,
                count,
                self.num_rows,
                problem,
                first[problem],
            )


@dataclass(frozen=True)
class ExamplesSummary:
    """What became of the rows of the files."""

    num_files: int
    num_rows: int
    num_kept: int
    num_learned: int
    """Tokens."""
    num_truncated: int

    def __str__(self) -> str:
        files = "1 file" if self.num_files == 1 else f"{self.num_files} files"
        over = f"; {self.num_truncated:,} responses are truncated at data.max_response_tokens" if self.num_truncated else ""
        return f"{self.num_kept:,} of {self.num_rows:,} rows of {files}, with {self.num_learned:,} tokens to learn{over}"


@dataclass(frozen=True)
class Examples:
    """A dataset of examples, in memory as tokens: one for each row of the files, or `per_row` of them."""

    examples: list[Example]
    row_numbers: npt.NDArray[np.int64]
    """Shape [N]: of each row in the files laid end to end, those left out counted."""
    rows_per_file: tuple[int, ...]
    summary: ExamplesSummary
    per_row: int = 1
    margins: npt.NDArray[np.float32] | None = None
    """Of each row; None where no file has any."""

    def __len__(self) -> int:
        return len(self.row_numbers)

    def rows_of(self, prompt_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows that have these `prompt_id`s."""
        return np.searchsorted(self.row_numbers, prompt_ids)

    def columns(self, rows: npt.NDArray[np.int64]) -> dict[str, Array | ShardColumn]:
        """Prompt and response with `loss_mask`, and of pairs `pair` and, where the files have it, `margin`."""
        chosen = [self.examples[number] for row in rows for number in range(row * self.per_row, (row + 1) * self.per_row)]
        prompt, response = (
            Ragged.from_rows([getattr(example, name) for example in chosen], np.int32) for name in ("prompt", "response")
        )
        mask = Ragged.from_rows([example.mask for example in chosen], np.bool_)
        pairs: dict[str, Array | ShardColumn] = {}
        if self.per_row > 1:
            pairs["pair"] = np.repeat(np.arange(len(rows)), self.per_row)
            if self.margins is not None:
                pairs["margin"] = np.repeat(self.margins[rows], self.per_row)
        return {
            **pairs,
            "prompt": prompt,
            "prompt_text": [example.prompt_text for example in chosen],
            "prompt_tokens": prompt.lengths,
            "prompt_id": np.repeat(self.row_numbers[rows], self.per_row),
            "response": response,
            "response_text": [example.response_text for example in chosen],
            "response_tokens": response.lengths,
            "truncated": np.array([example.is_truncated for example in chosen], np.bool_),
            "loss_mask": mask,
            "loss_tokens": np.array([sum(example.mask) for example in chosen], np.int64),
        }


def read_examples(
    files: Sequence[str], columns: Sequence[ColumnSpec], make: MakeExamples, *, key: str, per_row: int = 1
) -> Examples:
    """The examples of Parquet files, in file order; `key` is the configuration key that names them.

    Raises:
        DataError: a file or column is missing, rows are malformed, or none is left.
    """
    opened = [open_parquet(path, columns, key=key) for path in files]
    examples: list[Example] = []
    numbers: list[int] = []
    margins: list[float] = []
    per_file: list[int] = []
    useless = Counter[str]()
    start = 0
    with Progress("reading and tokenising rows", sum(file.metadata.num_rows for file in opened)) as progress:
        for path, file in zip(files, opened, strict=True):
            findings = Findings(f"{key}: {path}")
            warn_of_unread(file, columns, where=findings.where)
            for batch in read_batches(file, columns, where=findings.where):
                for row in batch.to_pylist():
                    row = {name: without_nulls(value) for name, value in row.items()}
                    found = findings.examples(row, make)
                    if found:
                        examples += found
                        numbers.append(start + findings.num_rows - 1)
                        margins.append(float(row.get("margin") or 0.0))
                progress.advance(batch.num_rows)
            findings.tell()
            useless.update(findings.useless.values())
            start += findings.num_rows
            per_file.append(len(numbers) - sum(per_file))
    summary = ExamplesSummary(
        num_files=len(files),
        num_rows=start,
        num_kept=len(numbers),
        num_learned=sum(sum(example.mask) for example in examples),
        num_truncated=sum(example.is_truncated for example in examples),
    )
    if not numbers:
        why = f": {useless.most_common(1)[0][0]}" if useless else ""
        raise DataError(f"{key}: none of {start} rows can be learned from{why}")
    logger.info("%s: %s", key, summary)
    return Examples(
        examples,
        np.array(numbers, np.int64),
        tuple(per_file),
        summary,
        per_row,
        np.array(margins, np.float32) if any("margin" in file.schema_arrow.names for file in opened) else None,
    )


def limited(example: Example, data: DataConfig) -> Example:
    """The example within `data.max_prompt_tokens` and `data.max_response_tokens`.

    Raises:
        BadRowError: the prompt is longer and `data.overlong_prompts` is error.
        UselessRowError: it is longer and to be dropped, or nothing is left to learn.
    """
    prompt, response, mask = example.prompt, example.response, example.mask
    if not prompt:
        raise BadRowError("nothing stands before what is to be learned: the prompt has no tokens")
    if len(prompt) > data.max_prompt_tokens:
        match data.overlong_prompts:
            case "error":
                raise BadRowError(f"the prompt has {len(prompt)} tokens, more than data.max_prompt_tokens")
            case "drop":
                raise UselessRowError("the prompt is longer than data.max_prompt_tokens")
            case "truncate_left":
                prompt = prompt[-data.max_prompt_tokens :]
    is_truncated = len(response) > data.max_response_tokens
    response, mask = response[: data.max_response_tokens], mask[: data.max_response_tokens]
    if not any(mask):
        raise UselessRowError("no token is left to learn within data.max_response_tokens")
    return Example(prompt, response, mask, example.prompt_text, example.response_text, is_truncated)
