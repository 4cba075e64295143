"""Tools: how models write calls of them, and an environment that runs Python functions as tools.

The schemas of tools reach the model by its chat template, and what it says is read in the format in which that template would
write it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from hybridflow.environments.base import Message, Row
from hybridflow.errors import EpisodeError

Calls = list[dict[str, object]]
"""`{"name": ..., "arguments": {...}}` each."""


@dataclass(frozen=True)
class ToolFormat:
    """How one family of models writes calls."""

    mark: str
    """By which a chat template tells that it is this one."""
    read: Callable[[str], tuple[str, Calls]]
    """What was said beside the calls, and the calls. Raises ValueError where they cannot be read."""


def _hermes(text: str) -> tuple[str, Calls]:
    bodies = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL)
    if text.count("<tool_call>") != len(bodies):
        raise ValueError("<tool_call> is not closed")
    return re.sub(r"\s*<tool_call>.*?</tool_call>\s*", "", text, flags=re.DOTALL), [_call(json.loads(body)) for body in bodies]


def _mistral(text: str) -> tuple[str, Calls]:
    content, mark, body = text.partition("[TOOL_CALLS]")
    found = json.loads(body) if mark else []
    return content, [_call(call) for call in (found if isinstance(found, list) else [found])]


def _llama3(text: str) -> tuple[str, Calls]:
    """The whole of what was said is one call, or several with semicolons between them; anything else is no call."""
    decoder, rest, calls = json.JSONDecoder(), text.replace("<|python_tag|>", "").strip(), Calls()
    if not rest.startswith("{"):
        return text, []
    while rest:
        found, end = decoder.raw_decode(rest)
        calls.append(_call(found))
        rest = rest[end:].lstrip("; \n")
    return "", calls


def _call(found: object) -> dict[str, object]:
    if not isinstance(found, Mapping) or not isinstance(found.get("name"), str):
        raise ValueError(f"a call is an object with name and arguments; found {found!r:.80}")
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of a call are an object; found {arguments!r:.80}")
    return {"name": found["name"], "arguments": dict(arguments)}


FORMATS = {
    "hermes": ToolFormat("<tool_call>", _hermes),
    "mistral": ToolFormat("[TOOL_CALLS]", _mistral),
    "llama3": ToolFormat('"parameters"', _llama3),
}
"""The one in a chat template that comes first here is its own."""


def format_of(name: str, template: str | None) -> ToolFormat:
    """The format of that name, or with `auto` of a chat template: hermes where the template knows no tools."""
    if name != "auto":
        return FORMATS[name]
    return next((known for known in FORMATS.values() if known.mark in (template or "")), FORMATS["hermes"])


def message_of(text: str, tool_format: ToolFormat) -> Message:
    """What the policy said as a message: `content` without its calls, and `tool_calls` as in chat templates.

    Calls that cannot be read are `tool_error`, and all of the text is the content.
    """
    try:
        content, calls = tool_format.read(text)
    except ValueError as error:
        return {"role": "assistant", "content": text, "tool_error": str(error)}
    if not calls:
        return {"role": "assistant", "content": text}
    listed = [{"type": "function", "id": f"call{number:05d}", "function": call} for number, call in enumerate(calls)]
    return {"role": "assistant", "content": content, "tool_calls": listed}


def schema_of(tool: Callable[..., object]) -> Mapping[str, object]:
    """By which a chat template shows a tool. What its annotations and its docstring do not say is left open.

    Raises:
        EpisodeError: an annotation is of a kind that JSON does not have, such as `tuple[int, ...]`, or its name is not known.
    """
    from transformers.utils.chat_template_utils import TypeHintParsingException

    try:
        return _schema(tool)
    except (NameError, TypeHintParsingException) as error:
        said = f"the tool {tool.__name__!r} cannot be described: {error!s:.200}"
        raise EpisodeError(f"{said}. Annotate it otherwise, with names of its own file") from error


def _schema(tool: Callable[..., object]) -> Mapping[str, object]:
    from transformers.utils.chat_template_utils import (
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
        parse_google_format_docstring,
    )

    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException):
        head, mark, words = (inspect.getdoc(tool) or "").partition("Args:")
        words = re.sub(r"^( *\w+) *\(.*?\):", r"\1:", words, flags=re.MULTILINE)  # name (type): text
        summary, said, _ = parse_google_format_docstring(head + mark + words)
    parameters = [
        parameter.replace(annotation=Any if parameter.annotation is parameter.empty else parameter.annotation)
        for parameter in inspect.signature(tool, eval_str=True).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]

    def described() -> None:
        pass

    described.__name__ = tool.__name__
    described.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    described.__dict__["__signature__"] = inspect.Signature(parameters)
    arguments = [f"    {parameter.name}: {(said or {}).get(parameter.name, parameter.name)}" for parameter in parameters]
    described.__doc__ = "\n".join([summary or tool.__name__, "", "Args:", *arguments])
    return get_json_schema(described)


class ToolEnvironment:
    """Python functions as tools. To inherit from: a class of your own names `tools`, and may replace `score`.

    An episode ends with the first message that calls no tool. A function is described to the model by its annotations and its
    docstring (Google's style, with a section Args where arguments need words); it may be `async`. What it raises goes to the
    model as text.

    Example:
        >>> def add(a: int, b: int) -> int:
        ...     "The sum of two numbers."
        ...     return a + b
        >>> class Calculator(ToolEnvironment):
        ...     tools = (add,)
        ...
        ...     def score(self, message):
        ...         return float(message["content"].strip() == self.row["ground_truth"])
    """

    tools: ClassVar[Sequence[Callable[..., object]]] = ()

    def reset(self, row: Row) -> tuple[list[Message], dict[str, object]]:
        """The dataset's prompt, and the schemas of the tools."""
        self.row, self.num_calls, self.num_errors = row, 0, 0
        return row["messages"], {"tools": [schema_of(tool) for tool in self.tools]}

    async def step(self, message: Message) -> tuple[list[Message], float | None, bool, bool, dict[str, object]]:
        """What the called tools have given; or, where none is called, the end and `score`."""
        answers = await self._answers(message)
        info: dict[str, object] = {"tool_calls": self.num_calls, "tool_errors": self.num_errors}
        if answers:
            return answers, 0.0, False, False, info
        score = self.score(message)
        return [], await score if inspect.isawaitable(score) else score, True, False, info

    def score(self, message: Message) -> float | None:
        """The reward of the last message, plain or `async`; None leaves it to the reward role (`environment.add_reward`)."""
        return None

    async def _answers(self, message: Message) -> list[Message]:
        if "tool_error" in message:
            self.num_errors += 1
            return [{"role": "tool", "content": f"error: the call cannot be read: {message['tool_error']}"}]
        calls = message.get("tool_calls", [])
        assert isinstance(calls, list)
        return [await self._answer(call["function"], call["id"]) for call in calls]

    async def _answer(self, call: Mapping[str, object], number: str) -> Message:
        self.num_calls += 1
        known, name, arguments = {tool.__name__: tool for tool in self.tools}, str(call["name"]), call["arguments"]
        try:
            if name not in known:
                raise LookupError(f"there is no tool {name!r}; there are {', '.join(known)}")
            assert isinstance(arguments, dict)
            tool = known[name]
            result = tool(**arguments) if inspect.iscoroutinefunction(tool) else asyncio.to_thread(tool, **arguments)
            content = str(await result)
        except Exception as error:
            self.num_errors += 1
            content = f"error: {type(error).__name__}: {error}"
        return {"role": "tool", "name": name, "tool_call_id": number, "content": content}
