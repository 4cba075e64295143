"""Chats, for supervised fine-tuning: what the assistant says is learned, the rest is context."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hybridflow.config.schema import DataConfig
from hybridflow.data.examples import BadRowError, Example, Row, UselessRowError, limited
from hybridflow.data.marks import MarkError, Template, is_learned, marked
from hybridflow.data.parquet import ColumnSpec, has_fields, is_messages, is_text
from hybridflow.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hybridflow.data.chat import Message

MESSAGES = ColumnSpec(
    name="messages",
    expected="a list of structs with the strings role and content",
    fits=is_messages,
)
TOOLS = ColumnSpec(
    name="tools", expected="a list of tool schemas, or one as JSON text", fits=lambda kind: True, is_required=False
)
TEMPLATE_OPTIONS = ColumnSpec(
    name="chat_template_kwargs", expected="a struct", fits=lambda kind: has_fields(kind) or is_text(kind), is_required=False
)
TEMPLATE_COLUMNS = (TOOLS, TEMPLATE_OPTIONS)
"""What a row may give its chat template."""
CHAT_COLUMNS = (MESSAGES, *TEMPLATE_COLUMNS)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises DataError where there is no chat template, which messages need."""
    if not tokenizer.chat_template:
        raise DataError(
            "the files hold chat messages, but the tokenizer has no chat template. Add a chat_template.jinja to its folder, "
            "or set model.tokenizer to one that has it"
        )


class Conversations:
    """Makes examples of rows with messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: DataConfig):
        check_template(tokenizer)
        self.tokenizer, self.data = tokenizer, data

    def __call__(self, row: Row) -> list[Example]:
        """One example for the whole conversation. Raises as `read_examples` expects it."""
        return [limited(self.example(checked_chat(row), row), self.data)]

    def example(self, messages: Sequence[Message], row: Row, *, first: int = 0) -> Example:
        """The conversation, of which the assistant's turns from message `first` on are learned.

        Raises:
            BadRowError: the chat template refuses it, or its turns or their tool calls are not found in the text.
        """
        template = Template(self.tokenizer, {**self.data.chat_template_options, **template_options(row)})
        try:
            found = marked(template, messages, first=first)
        except Exception as error:  # a template may end in anything
            about = "" if isinstance(error, MarkError) else "the chat template refuses the conversation: "
            raise BadRowError(f"{about}{error}") from error
        if not any(found.mask):
            raise UselessRowError("the chat template writes nothing of what the assistant says")
        start = found.mask.index(True)
        prompt, response = found.ids[:start], found.ids[start:]
        mask = found.mask[start:]
        end = len(mask) - mask[::-1].index(True)  # what follows the last turn is neither learned nor context
        response, mask = response[:end], mask[:end]
        texts = str(self.tokenizer.decode(prompt)), str(self.tokenizer.decode(response, skip_special_tokens=True))
        return Example(prompt, response, mask, *texts)


def checked_chat(row: Row) -> list[Message]:
    """The messages of a row of chats, of which something is learned.

    Raises:
        BadRowError: as of `checked_messages`.
        UselessRowError: the assistant says nothing, or nothing that is learned.
    """
    messages = checked_messages(row["messages"], "messages")
    roles = {str(message["role"]) for message in messages}
    if "assistant" not in roles:
        raise UselessRowError(f"the conversation has no assistant turn: its roles are {', '.join(sorted(roles))}")
    if not any(is_learned(message) for message in messages):
        raise UselessRowError("every assistant turn of the conversation has the weight 0")
    return messages


def checked_messages(value: object, name: str) -> list[Message]:
    """Messages without the fields that only other rows of the file have.

    Raises:
        BadRowError: there are none, or one has no role or neither content nor tool calls, or a weight that is no number.
    """
    if not isinstance(value, list) or not value:
        raise BadRowError(f"column {name!r} is {'null' if value is None else 'empty'}")
    messages: list[Message] = []
    for number, message in enumerate(value):
        given = {key: field for key, field in (message or {}).items() if field is not None}
        if not isinstance(given.get("role"), str) or not given["role"]:
            raise BadRowError(f"message {number} of column {name!r} has no role")
        if "content" not in given and not given.get("tool_calls"):
            raise BadRowError(f"message {number} of column {name!r} has neither content nor tool_calls")
        if given["role"] == "assistant" and not isinstance(given.get("weight", 1), int | float):
            raise BadRowError(f"message {number} of column {name!r} has the weight {given['weight']!r}; expected a number")
        messages.append({"content": "", **given})
    return messages


def check_text(value: object, name: str) -> None:
    """Raises BadRowError where a text is messages written as JSON, which a model would read as they stand."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return
    try:
        loaded = json.loads(value)
    except (ValueError, RecursionError):  # numbers may be too long, brackets too many
        return
    if loaded and all(isinstance(message, dict) and "role" in message for message in loaded):
        raise BadRowError(f"column {name!r} is JSON text of messages: write the file with json.loads of it")


def template_options(row: Row) -> dict[str, object]:
    """What a row gives its chat template: `tools`, and the entries of `chat_template_kwargs`; either may be JSON text.

    Raises:
        BadRowError: the text is not JSON, or of another kind.
    """
    options: dict[str, object] = {}
    column = row.get("chat_template_kwargs")
    given = _from_json(column, "chat_template_kwargs")
    if given is not None and not isinstance(given, Mapping):
        raise BadRowError(f"column 'chat_template_kwargs' holds {given!r:.80}; expected names and values")
    if given is not None:  # of a struct, Parquet has every entry in every row; a null in JSON text was written
        options.update({str(name): value for name, value in given.items() if value is not None or isinstance(column, str)})
    if tools := _from_json(row.get("tools"), "tools"):
        options["tools"] = [_from_json(tool, "tools") for tool in tools] if isinstance(tools, list) else [tools]
    return options


def _from_json(value: object, name: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        loaded: object = json.loads(value) if value.strip() else None
    except json.JSONDecodeError as error:
        raise BadRowError(f"column {name!r} is not JSON: {error}") from error
    return loaded
