"""Which tokens of a conversation its assistant has said: by the chat template's own marks, or by rendering prefixes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hybridflow.data.chat import Message

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
"""First character, and the one behind the last."""


class MarkError(ValueError):
    """It cannot be told which part of the text an assistant's turn is."""


@dataclass(frozen=True)
class Marked:
    """A conversation as tokens."""

    ids: list[int]
    mask: list[bool]
    """Of each token: whether it is learned."""


def is_learned(message: Message) -> bool:
    """Whether it is a turn of the assistant without `weight` 0, by which chats for OpenAI's fine-tuning leave turns out."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


@dataclass(frozen=True)
class Template:
    """A tokenizer with the options of its chat template."""

    tokenizer: PreTrainedTokenizerBase
    options: Mapping[str, object]
    """Variables of the template, such as `enable_thinking`, and `tools`."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text; nothing of none."""
        if not messages:
            return ""
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.options,  # type: ignore[arg-type]
            ),
        )


def marked(template: Template, messages: Sequence[Message], *, first: int = 0) -> Marked:
    """The conversation in tokens, with those of the assistant's turns from message `first` on marked, each with its end.

    Example: with a template that writes `role: content<eos>` and a newline, the learned text of question and answer is
    `answer<eos>`.

    Raises:
        MarkError: the template rewrites what has been said so that a turn is not found in the text, or does not write the
            tool call of a turn that is learned.
    """
    text, spans = _marked_text(template, messages, first)
    tokenizer = template.tokenizer
    if not tokenizer.is_fast:  # knows no offsets
        return _by_segments(tokenizer, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = cast(list[int], encoded["input_ids"]), cast(list[Span], encoded["offset_mapping"])
    return Marked(ids, [any(start <= begin < stop for start, stop in spans) for begin, _ in offsets])


def _by_segments(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> Marked:
    ids: list[int] = []
    mask: list[bool] = []
    bounds = sorted({0, len(text), *(bound for span in spans for bound in span)})
    for start, stop in itertools.pairwise(bounds):
        found = cast(list[int], tokenizer(text[start:stop], add_special_tokens=False, verbose=False)["input_ids"])
        ids += found
        mask += [any(first <= start < last for first, last in spans)] * len(found)
    return Marked(ids, mask)


def _marked_text(template: Template, messages: Sequence[Message], first: int) -> tuple[str, list[Span]]:
    """The whole text, with the spans of the assistant's turns from message `first` on."""
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [number >= first and is_learned(messages[number]) for number in turns]
    if GENERATION_MARK.search(str(template.tokenizer.chat_template)):
        text, spans = _by_template(template, messages)
        if len(spans) != len(turns):
            raise MarkError(f"the chat template marks {len(spans)} of {len(turns)} assistant turns as its generation")
    else:
        text = template.render(messages)
        text, spans = _by_prefixes(template, messages, text)
    for number, (start, stop) in itertools.compress(zip(turns, spans, strict=True), learned):
        if unwritten := next((name for name in _called(messages[number]) if name not in text[start:stop]), None):
            raise MarkError(f"the chat template does not write the tool call of {unwritten!r}: the turn would be learned empty")
    return text, list(itertools.compress(spans, learned))


def _called(message: Message) -> Iterator[str]:
    """Names of the functions that a message calls."""
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        yield str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _by_template(template: Template, messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """By `{% generation %}`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = template.tokenizer
    rendered, spans = cast(
        tuple[list[str], list[list[Span]]],
        render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=cast(str, tokenizer.chat_template),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **template.options},  # type: ignore[arg-type]
        ),
    )
    return rendered[0], [(start, stop) for start, stop in spans[0]]


def _by_prefixes(template: Template, messages: Sequence[Message], text: str) -> tuple[str, list[Span]]:
    """A turn begins where the rendering of what was before it, with the generation prompt, ends."""
    spans: list[Span] = []
    eos = str(template.tokenizer.eos_token or "")
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = _found(template, messages, number, text)
        said = text[start:stop]
        if eos and eos in said:
            said = said[: said.rindex(eos) + len(eos)]
        said = said.rstrip() if not said.endswith(eos) or not eos else said
        spans.append((start, start + len(said)))
    if spans and messages[-1]["role"] == "assistant":
        content = str(messages[-1].get("content") or "").strip()
        start, stop = spans[-1]
        if eos and text[start:stop].strip() == content:  # the template leaves the end to the model
            text = text[:stop] + eos
            spans[-1] = (start, len(text))
    return text, spans


def _found(template: Template, messages: Sequence[Message], number: int, text: str) -> Span:
    """Where the turn of message `number` is in the text of all messages.

    Some templates write a turn otherwise once others follow it, without its thoughts for example: what was said last is then
    looked for, and its end mark behind it.
    """
    before = template.render(messages[:number], add_generation_prompt=True)
    after = template.render(messages[: number + 1])
    has_start = text.startswith(before)
    if has_start and text.startswith(after):
        return len(before), len(after)
    plain = template.render(messages[:number])
    said = str(messages[number].get("content") or "").rpartition("</think>")[2].strip()
    end_mark = after[after.rindex(said) + len(said) :] if said in after else ""
    at = text.find(said + end_mark, len(before) if has_start else len(plain))
    if not said or at < 0 or not (has_start or text.startswith(plain)):
        raise MarkError(f"the chat template rewrites message {number}, an assistant turn, once others follow it")
    return len(before) if has_start else at, at + len(said + end_mark)
