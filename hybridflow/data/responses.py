"""Prompts with the dataset's own responses, for supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hybridflow.batch import Array, Ragged, ShardColumn
from hybridflow.config.rules_agreement import turn_end
from hybridflow.config.schema import DataConfig
from hybridflow.data.chat import encode
from hybridflow.data.conversations import TEMPLATE_COLUMNS
from hybridflow.data.parquet import ColumnSpec, is_text
from hybridflow.data.prompts import DATA_SOURCE, EXTRA_INFO, GROUND_TRUTH, PROMPT, Prompts, PromptSummary, read_prompts
from hybridflow.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE = ColumnSpec(name="response", expected="a string", fits=is_text)
RESPONSE_COLUMNS = (
    PROMPT,
    RESPONSE,
    replace(GROUND_TRUTH, is_required=False),
    replace(DATA_SOURCE, is_required=False),
    EXTRA_INFO,
    *TEMPLATE_COLUMNS,
)
"""Learning from responses needs neither a ground truth nor its source."""


@dataclass(frozen=True)
class Responses:
    """Prompts and their responses. A response is tokenised when its row is drawn."""

    prompts: Prompts
    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...]
    """Tokens that end a response; the first is the one that is added."""
    max_response_tokens: int
    key: str
    """The configuration key that names the files, for messages."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def rows_per_file(self) -> tuple[int, ...]:
        """Prompts kept of each file."""
        return self.prompts.rows_per_file

    @property
    def summary(self) -> PromptSummary:
        """What became of the rows of the files."""
        return self.prompts.summary

    def rows_of(self, prompt_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The rows that have these `prompt_id`s."""
        return self.prompts.rows_of(prompt_ids)

    def columns(self, rows: npt.NDArray[np.int64]) -> dict[str, Array | ShardColumn]:
        """The prompts' columns, and response, response_text, response_tokens and truncated.

        A response ends with what ends turns in the chat template, else with the end of sequence, once; unless it was truncated
        at `max_response_tokens`.

        Raises:
            DataError: a response is null.
        """
        texts = self.prompts.stored["response"].take(rows)
        for row, text in zip(rows, texts, strict=True):
            if not isinstance(text, str):
                raise DataError(f"row {self.prompts.row_numbers[row]} of {self.key}: column 'response' is null")
        strings = [str(text) for text in texts]
        encoded = encode(self.tokenizer, strings, add_special_tokens=False)
        whole = [self._ended(ids) for ids in encoded]
        response = Ragged.from_rows([ids[: self.max_response_tokens] for ids in whole], np.int32)
        return {
            **self.prompts.columns(rows),
            "response": response,
            "response_text": texts,
            "response_tokens": response.lengths,
            "truncated": np.array([len(ids) > self.max_response_tokens for ids in whole], np.bool_),
        }

    def _ended(self, ids: list[int]) -> list[int]:
        """With one end, also where the file's text brings its own, with or without a line's end behind it."""
        last = max((place for place, token_id in enumerate(ids) if token_id in self.ends), default=None)
        if last is not None and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
            return ids[: last + 1]
        return [*ids, self.ends[0]]


def read_responses(
    files: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, data: DataConfig, key: str = "data.train_files"
) -> Responses:
    """The prompts and responses of Parquet files, in file order.

    Raises:
        DataError: a file or column is missing or malformed, or no prompt is left.
        ModelError: the tokenizer has no end of sequence, so that a model would never learn to end.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
    prompts = read_prompts(files, tokenizer, data=data, key=key, columns=RESPONSE_COLUMNS)
    turn = None if data.apply_chat_template == "never" else turn_end(tokenizer)
    ends = (tokenizer.eos_token_id,) if turn is None else (turn, tokenizer.eos_token_id)
    return Responses(prompts, tokenizer, ends, data.max_response_tokens, key)
