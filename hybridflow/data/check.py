"""What is wrong with a data file, row by row: `python -m hybridflow.data check FILE`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from hybridflow.config.schema import DataConfig
from hybridflow.data.chunks import check_prompt
from hybridflow.data.conversations import CHAT_COLUMNS, Conversations, checked_chat, template_options
from hybridflow.data.examples import BadRowError, Example, Findings, Row
from hybridflow.data.formats import PICTURES, advice
from hybridflow.data.parquet import ColumnSpec, has_pictures, open_parquet, read_batches, without_nulls
from hybridflow.data.preferences import PREFERENCE_COLUMNS, Preferences, checked_pair
from hybridflow.data.prompts import EPISODE_COLUMNS, PROMPT_COLUMNS
from hybridflow.data.responses import RESPONSE_COLUMNS
from hybridflow.rewards.by_data_source import RULES
from hybridflow.rewards.ground_truths import why_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CheckRow = Callable[[Row], object]
BY_DATA_SOURCE = "by_data_source"
NOTHING = Example([0], [0], [True], "", "")


@dataclass(frozen=True)
class Kind:
    """What a file is for."""

    name: str
    columns: Sequence[ColumnSpec]
    check: CheckRow
    """Raises BadRowError or UselessRowError."""


@dataclass(frozen=True)
class Report:
    """What was found in a file."""

    kind: str
    num_rows: int
    problems: dict[int, str]
    """Row -> what is wrong."""
    unread: list[str]
    """Columns that nobody reads."""
    form: str
    """What to do with those of a form that is known."""
    has_pictures: bool
    """They are not read."""
    without_rule: Counter[str]
    """Data sources that `by_data_source` has no rule for, where it is to score, with their numbers of rows."""

    def lines(self) -> Iterator[str]:
        """For people."""
        for row, problem in sorted(self.problems.items()):
            yield f"row {row}: {problem}"
        if self.unread:
            yield f"columns that are not read: {', '.join(self.unread)}"
        if self.form:
            yield self.form
        if self.has_pictures:
            yield PICTURES
        for source, count in sorted(self.without_rule.items()):
            yield f"data_source {source!r} ({count} rows) has no rule of its own: name one as --reward, or write a function"
        yield f"{self.kind}: {self.num_rows - len(self.problems)} of {self.num_rows} rows can be used"


def check_file(
    path: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: DataConfig | None = None,
    rule: str = BY_DATA_SOURCE,
) -> Report:
    """Every row of a file as training would read it; with a tokenizer its chat template and the lengths of `data` too.

    What the file is for is told by its columns: `chosen` and `rejected`, `messages`, `response`, or else prompts. `rule`, as
    `reward.name`, says which ground truths an answer can match.

    Raises:
        DataError: it is no Parquet file, or a column is missing or has another type.
    """
    file = open_parquet(path, (), key="check")
    kind = kind_of(file, tokenizer, data or DataConfig(), rule)
    file = open_parquet(path, kind.columns, key="check")
    findings, without_rule = Findings(path), Counter[str]()

    def make(row: Row) -> Sequence[Example]:
        kind.check(row)
        return [NOTHING]

    for batch in read_batches(file, kind.columns, where=path):
        for row in batch.to_pylist():
            row = {name: without_nulls(value) for name, value in row.items()}  # as training reads it
            findings.examples(row, make)
            if (
                rule == BY_DATA_SOURCE
                and kind.columns is PROMPT_COLUMNS
                and row["data_source"]
                and row["data_source"] not in RULES
            ):
                without_rule[row["data_source"]] += 1
    known = {spec.name for spec in kind.columns}
    unread = [name for name in file.schema_arrow.names if name not in known]
    problems = findings.bad | {row: f"left out: {problem}" for row, problem in findings.useless.items()}
    form = advice(unread and file.schema_arrow.names)
    return Report(kind.name, findings.num_rows, problems, unread, form, has_pictures(file), without_rule)


def kind_of(file: pq.ParquetFile, tokenizer: PreTrainedTokenizerBase | None, data: DataConfig, rule: str) -> Kind:
    """By the names of the columns."""
    names = set(file.schema_arrow.names)
    if names & {"chosen", "rejected"}:
        return Kind("preferences", PREFERENCE_COLUMNS, checked_pair if tokenizer is None else Preferences(tokenizer, data))
    if "messages" in names:
        return Kind("chats", CHAT_COLUMNS, _chat if tokenizer is None else Conversations(tokenizer, data))
    if "response" in names:
        return Kind("prompts with responses", RESPONSE_COLUMNS, _answered)
    columns = PROMPT_COLUMNS if {"reward_model", "data_source"} & names else EPISODE_COLUMNS
    return Kind("prompts" if columns is PROMPT_COLUMNS else "prompts without rules", columns, partial(_prompt, rule=rule))


def _chat(row: Row) -> None:
    checked_chat(row)
    template_options(row)


def _prompt(row: Row, *, rule: str = "none") -> None:
    check_prompt(row["prompt"])
    template_options(row)
    truth = row.get("reward_model")
    if "reward_model" in row and (truth is None or (isinstance(truth, dict) and truth.get("ground_truth") is None)):
        raise BadRowError("column 'reward_model' has no ground_truth")
    if "data_source" in row and not row["data_source"]:
        raise BadRowError("column 'data_source' is null or empty")
    why = why_of(rule)
    if isinstance(truth, dict) and why and (problem := why(truth["ground_truth"], str(row.get("data_source")))):
        raise BadRowError(f"column 'reward_model.ground_truth' is {problem}: no answer can match it by reward.name={rule}")
    limit = row.get("max_response_tokens")
    if isinstance(limit, int) and limit < 1:
        raise BadRowError(f"column 'max_response_tokens' holds {limit}; a response has at least 1 token")


def _answered(row: Row) -> None:
    if not isinstance(row.get("response"), str):
        raise BadRowError("column 'response' is null")
    _prompt({name: value for name, value in row.items() if name == "prompt"})
