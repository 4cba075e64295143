"""Calls of tools as models write them, and functions as tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from examples.environments.calculator import Calculator
from hybridflow.environments.base import Row
from hybridflow.environments.tools import FORMATS, format_of, message_of, schema_of
from hybridflow.errors import EpisodeError

ROW: Row = {
    "messages": [{"role": "user", "content": "6*7="}],
    "ground_truth": "42",
    "data_source": "test",
    "extra_info": {},
    "seed": 0,
    "sample": 0,
}


def call(name: str, **arguments: object) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("name", "text", "content", "calls"),
    [
        ("hermes", "yes", "yes", []),
        ("hermes", 'so <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "so", [("f", {"x": 1})]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>', "", [("f", {}), ("g", {})]),
        ("mistral", "[TOOL_CALLS]{}", None, None),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": "{\\"x\\": 1}"}]', "", [("f", {"x": 1})]),
        ("mistral", "{1}", "{1}", []),
        ("llama3", '<|python_tag|>{"name": "f", "parameters": {"x": 1}}; {"name": "g", "parameters": {}}', "", None),
        ("llama3", "a {brace}", "a {brace}", []),
        ("hermes", "<tool_call>{broken}</tool_call>", None, None),
        ("hermes", '<tool_call>{"name": "f"', None, None),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>', None, None),
    ],
)
def test_calls_are_read(name: str, text: str, content: str | None, calls: list[tuple[str, object]] | None) -> None:
    message = message_of(text, FORMATS[name])
    if content is None:
        assert message["content"] == text and "tool_error" in message and "tool_calls" not in message
        return
    assert message["content"] == content
    found = message.get("tool_calls", [])
    assert isinstance(found, list)
    if calls is None:
        assert len(found) == 2
    else:
        assert [(one["function"]["name"], one["function"]["arguments"]) for one in found] == calls


def test_a_template_tells_its_format() -> None:
    assert format_of("auto", 'x "parameters" y') is FORMATS["llama3"]
    assert format_of("auto", None) is format_of("hermes", "[TOOL_CALLS]") is FORMATS["hermes"]


def test_functions_are_tools() -> None:
    calculator = Calculator()
    messages, info = calculator.reset(ROW)
    assert messages == ROW["messages"]
    (schema,) = info["tools"]  # type: ignore[misc]
    assert schema["function"]["name"] == "calculate" and "expression" in schema["function"]["parameters"]["properties"]
    answers, reward, terminated, _, info = asyncio.run(calculator.step(call("calculate", expression="6*7")))
    assert answers == [{"role": "tool", "name": "calculate", "tool_call_id": "1", "content": "42"}]
    assert (reward, terminated, info["tool_calls"]) == (0.0, False, 1)
    answers, reward, terminated, _, _ = asyncio.run(calculator.step({"role": "assistant", "content": "42"}))
    assert (answers, reward, terminated) == ([], 1.0, True)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (call("calculate", expression="__import__('os')"), "ValueError: only whole numbers"),
        (call("calculate", wrong=1), "TypeError"),
        (call("shell", command="ls"), "there is no tool 'shell'; there are calculate"),
        ({"role": "assistant", "content": "", "tool_error": "it is not closed"}, "cannot be read: it is not closed"),
    ],
)
def test_what_a_tool_raises_is_told_to_the_model(message: dict[str, object], told: str) -> None:
    calculator = Calculator()
    calculator.reset(ROW)
    (answer,), _, terminated, _, info = asyncio.run(calculator.step(message))
    assert told in str(answer["content"]) and not terminated and info["tool_errors"] == 1


def add(a: int, b: int | None = None, *rest: int, **options: int) -> object:
    """The sum."""
    return a + (b or 0)


def bare(x, y="z"):  # type: ignore[no-untyped-def]
    return x


class Shelf:
    def find(self, title: str) -> str:
        """Finds a book.

        Args:
            title: Of the book.
        """
        return title


def test_a_tool_is_described_as_far_as_it_says() -> None:
    integer = {"type": "integer", "description": "a"}
    assert schema_of(add)["function"] == {
        "name": "add",
        "description": "The sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": integer, "b": {"type": "integer", "nullable": True, "description": "b"}},
            "required": ["a"],
        },
    }
    described = schema_of(bare)["function"]
    assert isinstance(described, dict) and described["description"] == "bare"
    assert described["parameters"]["properties"] == {"x": {"description": "x"}, "y": {"description": "y"}}
    found = schema_of(Shelf().find)["function"]
    assert isinstance(found, dict) and found["parameters"]["properties"]["title"]["description"] == "Of the book."


def typed(query: str, number=1):  # type: ignore[no-untyped-def]
    """Searches.

    Args:
        query (str): What is
            looked for.
        number (int, optional): How many.
    """


def test_words_of_arguments_with_types_reach_the_schema() -> None:
    function = schema_of(typed)["function"]
    assert isinstance(function, dict)
    found = function["parameters"]["properties"]
    assert [found[name]["description"] for name in ("query", "number")] == ["What is looked for.", "How many."]


def many(numbers: tuple[int, ...]) -> None:
    """Many."""


def unknown(number: Absent) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Unknown."""


def wordless(number: Absent) -> None:  # type: ignore[name-defined]  # noqa: F821
    pass


@pytest.mark.parametrize("tool", [many, unknown, wordless])
def test_a_tool_with_an_annotation_that_cannot_be_described_is_named(tool: Callable[..., object]) -> None:
    with pytest.raises(EpisodeError, match=f"the tool '{tool.__name__}' cannot be described"):
        schema_of(tool)
