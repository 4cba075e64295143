"""Some thousand rows of a Parquet file at a time: prompts tokenised, overlong ones dropped or truncated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from hybridflow.batch import Ragged
from hybridflow.config.schema import DataConfig
from hybridflow.data.chat import Message, RowError, encode, is_templated, prompt_texts
from hybridflow.data.conversations import TEMPLATE_COLUMNS, check_text, checked_messages, template_options
from hybridflow.data.examples import BadRowError
from hybridflow.data.parquet import ColumnSpec, is_messages, read_batches, without_nulls
from hybridflow.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TEXT = "prompt_text"
PROMPT = "prompt"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of one file, after filtering."""

    tokens: Ragged
    rows: npt.NDArray[np.int64]
    """Of each prompt kept, among the rows read."""
    stored: dict[str, pa.Array]
    """`prompt_text`, `prompt` as the file has it, and every column asked for; nulls where the file lacks it."""
    num_rows: int
    """Read, that is before filtering."""
    num_overlong: int
    shortest_tokens: int
    longest_tokens: int

    def __len__(self) -> int:
        return len(self.rows)


class ChunkReader:
    """Reads files by one tokenizer and one treatment of overlong prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig, columns: Sequence[ColumnSpec]):
        self.tokenizer, self.data, self.columns = tokenizer, data, columns

    def chunks(self, file: pq.ParquetFile, *, where: str, max_prompts: int | None = None) -> Iterator[Chunk]:
        """The file in chunks, ending once `max_prompts` are kept. `where` names key and file in messages.

        Raises:
            DataError: a prompt is null or has no tokens, the chat template is missing or refuses it, or a prompt is too
                long and `data.overlong_prompts` is error.
        """
        start, kept = 0, 0
        for batch in read_batches(file, self.columns, where=where):
            if max_prompts is not None and kept >= max_prompts:
                return
            try:
                chunk = self._chunk(batch, None if max_prompts is None else max_prompts - kept)
            except RowError as error:
                raise DataError(f"{where}: row {start + error.row}: {error.problem}") from error
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            yield chunk
            start, kept = start + batch.num_rows, kept + len(chunk)

    def _chunk(self, batch: pa.RecordBatch, max_prompts: int | None) -> Chunk:
        texts, tokens = self._tokenised(batch)
        lengths = np.array([len(row) for row in tokens], np.int64)
        if (empty := np.flatnonzero(lengths == 0)).size:
            raise RowError(int(empty[0]), f"the prompt has no tokens: {texts[int(empty[0])]!r:.200}")
        overlong = lengths > self.data.max_prompt_tokens
        rows = np.arange(len(tokens))
        if overlong.any():
            rows = self._treat_overlong(np.flatnonzero(overlong), texts, tokens)
        rows = rows[:max_prompts]
        kept = [tokens[row] for row in rows]
        values = np.fromiter(chain.from_iterable(kept), np.int32, count=sum(map(len, kept)))
        return Chunk(
            tokens=Ragged.from_lengths(values, np.array([len(row) for row in kept], np.int64)),
            rows=rows,
            stored={PROMPT_TEXT: pa.array([texts[row] for row in rows], pa.large_string()), **self._others(batch, rows)},
            num_rows=len(tokens),
            num_overlong=int(overlong.sum()),
            shortest_tokens=int(lengths.min(initial=np.iinfo(np.int64).max)),
            longest_tokens=int(lengths.max(initial=0)),
        )

    def _tokenised(self, batch: pa.RecordBatch) -> tuple[list[str], list[list[int]]]:
        """Text and token ids of each prompt."""
        prompts = batch.column("prompt")
        values = prompts.to_pylist()
        for row, value in enumerate(values):
            try:
                check_prompt(value)
            except BadRowError as error:
                raise RowError(row, str(error)) from error
        has_messages = is_messages(prompts.type)
        if not is_templated(self.tokenizer, has_messages=has_messages, use=self.data.apply_chat_template):
            texts = cast(list[str], values)
            return texts, encode(self.tokenizer, texts, add_special_tokens=True)
        texts = prompt_texts(self.tokenizer, [conversation(value) for value in values], self._template_options(batch))
        return texts, encode(self.tokenizer, texts, add_special_tokens=False)  # the template writes them itself

    def _template_options(self, batch: pa.RecordBatch) -> list[dict[str, object]]:
        """What the chat template is given for each prompt, beside its messages."""
        names = [spec.name for spec in TEMPLATE_COLUMNS if spec.name in batch.schema.names]
        rows = batch.select(names).to_pylist() if names else [{}] * batch.num_rows
        options = []
        for number, row in enumerate(rows):
            try:
                options.append({**self.data.chat_template_options, **template_options(row)})
            except BadRowError as error:
                raise RowError(number, str(error)) from error
        return options

    def _treat_overlong(
        self, overlong: npt.NDArray[np.int64], texts: list[str], tokens: list[list[int]]
    ) -> npt.NDArray[np.int64]:
        """The rows that stay; truncated ones are changed in place."""
        limit = self.data.max_prompt_tokens
        match self.data.overlong_prompts:
            case "error":
                row = int(overlong[0])
                raise RowError(
                    row,
                    f"the prompt has {len(tokens[row])} tokens, more than data.max_prompt_tokens={limit}. "
                    "Raise it, or set data.overlong_prompts to drop or truncate_left",
                )
            case "drop":
                return np.setdiff1d(np.arange(len(tokens)), overlong)
            case "truncate_left":
                for row in overlong:
                    tokens[row] = tokens[row][-limit:]
                    texts[row] = self.tokenizer.decode(tokens[row])
                return np.arange(len(tokens))

    def _others(self, batch: pa.RecordBatch, rows: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
        """The columns as the file has them, for the rows that stay."""
        everything = len(rows) == batch.num_rows
        others = {}
        for name in (spec.name for spec in self.columns):
            if name not in batch.schema.names:
                others[name] = pa.nulls(len(rows))
            else:
                others[name] = batch.column(name) if everything else batch.column(name).take(pa.array(rows))
        return others


def conversation(prompt: str | list[Message]) -> list[Message]:
    """Chat messages, without the fields that only other rows of the file have."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return cast(list[Message], without_nulls(prompt))


def check_prompt(prompt: object) -> None:
    """Whether something is asked, and whether its messages are such.

    Raises:
        BadRowError: there is no text, or the last message of the user has none; a message is null or has no role or content; or
            the last one is the assistant's, which is what is to be generated.
    """
    messages = [] if isinstance(prompt, str | None) or not prompt else checked_messages(prompt, "prompt")
    asked = [prompt] if isinstance(prompt, str) else [message["content"] for message in messages if message["role"] == "user"]
    if prompt is None:
        raise BadRowError("column 'prompt' is null")
    check_text(prompt, "prompt")
    if not prompt or (asked and not str(asked[-1] or "").strip()):
        raise BadRowError(f"the prompt is empty: column 'prompt' holds {prompt!r:.200}. Leave the row out")
    if messages and messages[-1]["role"] == "assistant":
        raise BadRowError("column 'prompt' ends with an assistant turn, which is what is to be generated")
