"""Pairs of a chosen and a rejected response to a prompt, as texts or as messages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from hybridflow.config.schema import DataConfig
from hybridflow.data.chat import Message, encode, is_templated
from hybridflow.data.conversations import TEMPLATE_COLUMNS, Conversations, check_text, checked_messages, template_options
from hybridflow.data.examples import BadRowError, Example, Row, UselessRowError, limited
from hybridflow.data.marks import Template, is_learned
from hybridflow.data.parquet import ColumnSpec, is_number
from hybridflow.data.prompts import PROMPT
from hybridflow.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PREFERENCE_COLUMNS = (
    replace(PROMPT, is_required=False),
    replace(PROMPT, name="chosen"),
    replace(PROMPT, name="rejected"),
    ColumnSpec(name="margin", expected="a number", fits=is_number, is_required=False),
    *TEMPLATE_COLUMNS,
)


class Preferences:
    """Makes two examples of a row: the chosen response, then the rejected one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig):
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-sequence token; set eos_token in its tokenizer_config.json")
        self.tokenizer, self.data, self.eos_token_id = tokenizer, data, int(tokenizer.eos_token_id)

    def __call__(self, row: Row) -> list[Example]:
        """Raises as `read_examples` expects it."""
        checked_pair(row)
        chosen, rejected = row["chosen"], row["rejected"]
        if isinstance(chosen, str) and isinstance(rejected, str):
            pair = self._of_texts(row, chosen, rejected)
        else:
            pair = self._of_messages(row)
        pair = [limited(example, self.data) for example in pair]
        if pair[0].prompt + pair[0].response == pair[1].prompt + pair[1].response:
            raise UselessRowError("'chosen' and 'rejected' are the same within data.max_response_tokens")
        return pair

    def _of_texts(self, row: Row, chosen: str, rejected: str) -> list[Example]:
        prompt, options = row.get("prompt"), {**self.data.chat_template_options, **template_options(row)}
        if prompt is None:  # both tell the whole conversation, in a format of their own
            prompt = _shared(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            text, is_rendered = prompt, False
        else:
            tokenizer = self.tokenizer
            has_messages = not isinstance(prompt, str)
            is_rendered = is_templated(tokenizer, has_messages=has_messages, use=self.data.apply_chat_template)
            messages = checked_messages(prompt, "prompt") if has_messages else [{"role": "user", "content": prompt}]
            template = Template(self.tokenizer, options)
            try:
                text = template.render(messages, add_generation_prompt=True) if is_rendered else str(prompt)
            except Exception as error:  # a template may end in anything
                raise BadRowError(f"the chat template refuses the prompt: {error}") from error
        (ids,) = encode(self.tokenizer, [text], add_special_tokens=not is_rendered)
        return [self._answered(ids, text, response) for response in (chosen, rejected)]

    def _answered(self, prompt: list[int], text: str, response: str) -> Example:
        (ids,) = encode(self.tokenizer, [response], add_special_tokens=False)
        ids = [*ids, self.eos_token_id]
        return Example(prompt, ids, [True] * len(ids), text, response)

    def _of_messages(self, row: Row) -> list[Example]:
        whole, num_shared = _conversations(row)
        make = Conversations(self.tokenizer, self.data)
        return [make.example(messages, row, first=num_shared) for messages in whole]


def checked_pair(row: Row) -> None:
    """Raises BadRowError or UselessRowError where nothing can be learned from a row, whatever the tokenizer."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    for name in ("chosen", "rejected"):
        if not row[name]:
            raise BadRowError(f"column {name!r} is {'null' if row[name] is None else 'empty'}")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRowError("of 'chosen' and 'rejected' one is text and the other messages")
    for name in ("prompt", "chosen", "rejected"):
        check_text(row.get(name), name)
    if isinstance(chosen, str) and isinstance(rejected, str) and "prompt" not in row and not _shared(chosen, rejected):
        raise BadRowError("there is no 'prompt', and 'chosen' and 'rejected' begin differently")
    if "prompt" in row and not prompt:
        raise BadRowError(f"column 'prompt' is {'null' if prompt is None else 'empty'}")
    if chosen == rejected:
        raise UselessRowError("'chosen' and 'rejected' are the same")
    if not math.isfinite(cast("float | None", row.get("margin")) or 0.0):
        raise BadRowError(f"column 'margin' holds {row['margin']}; expected a finite number")
    template_options(row)
    if isinstance(chosen, list):
        _conversations(row)


def _conversations(row: Row) -> tuple[list[list[Message]], int]:
    """Both whole conversations, whether or not their columns repeat the prompt, and how many messages they begin with alike."""
    whole, prompt = [], row.get("prompt")
    for name in ("chosen", "rejected"):
        messages = checked_messages(row[name], name)
        if prompt is not None and messages[0]["role"] == "assistant":
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else checked_messages(prompt, "prompt")
            messages = [*before, *messages]
        whole.append(messages)
    num_shared = _num_shared(*whole)
    if not num_shared:
        raise BadRowError("'chosen' and 'rejected' begin with different messages: they answer different prompts")
    for name, messages in zip(("chosen", "rejected"), whole, strict=True):
        if not any(message["role"] == "assistant" for message in messages[num_shared:]):
            raise BadRowError(f"column {name!r} has no assistant turn of its own")
        if not any(is_learned(message) for message in messages[num_shared:]):
            raise UselessRowError(f"every assistant turn of its own in column {name!r} has the weight 0")
        if messages[-1]["role"] != "assistant":
            raise BadRowError(f"column {name!r} ends with a turn of role {messages[-1]['role']!r}, not with what is judged")
    return whole, num_shared


def _shared(one: str, other: str) -> str:
    """What both texts begin with, up to the last whitespace in it."""
    length = _num_shared(one, other)
    begun = re.search(r"\S*$", one[:length])  # a word that may go on differently
    return one[: begun.start() if begun else length].rstrip()


def _num_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Messages, or characters, that both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
