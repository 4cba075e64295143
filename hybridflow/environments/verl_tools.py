"""verl's tools and interactions as an environment, from the YAML files that its `multi_turn` section names.

The order is that of verl's loop of tools: calls are answered by tools; a message without a call goes to the interaction, and
without one ends the episode. What `execute` and `generate_response` give as scores are metrics, as in verl: the reward is that
of the reward function, for all that was said (`environment.add_reward: all`).
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from functools import cache
from threading import Lock
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import yaml

from hybridflow.environments import verl_names
from hybridflow.environments.base import Message, Row
from hybridflow.errors import EpisodeError
from hybridflow.user_file import import_file, split_name

LOADING = Lock()
"""Episodes are made on threads; the second one would find modules that the first one is still importing."""


class VerlEpisode:
    """An episode with tools, an interaction, or both."""

    def __init__(
        self,
        *,
        tool_config_path: str | None = None,
        interaction_config_path: str | None = None,
        max_parallel_calls: int = 1,
        max_tool_response_length: int = 256,
        tool_response_truncate_side: str = "middle",
        max_turns: int | None = None,
    ):
        with LOADING:
            self.tools: Mapping[str, Any] = tools_of(tool_config_path) if tool_config_path else {}
            self.interactions: Mapping[str, Any] = interactions_of(interaction_config_path) if interaction_config_path else {}
        self.max_parallel_calls, self.max_turns = max_parallel_calls, max_turns
        self.most, self.side = max_tool_response_length, tool_response_truncate_side
        self.number, self.scores, self.tool_rewards, self.num_turns = str(uuid4()), 0.0, 0.0, 0
        self.interaction: Any = None

    async def reset(self, row: Row) -> tuple[list[Message], dict[str, object]]:
        """The dataset's prompt and the tools' schemas; the row's `extra_info.interaction_kwargs` names its interaction."""
        self.messages = [dict(message) for message in row["messages"]]
        options = _mapping(row["extra_info"].get("tools_kwargs"))
        self.interaction_options = _mapping(row["extra_info"].get("interaction_kwargs"))
        self.agent_data = SimpleNamespace(messages=self.messages, tools_kwargs=options, request_id=self.number, extra_fields={})
        if self.interactions:
            name = self.interaction_options.get("name")
            if name not in self.interactions:
                known = ", ".join(self.interactions)
                raise LookupError(f"extra_info.interaction_kwargs.name is {name!r}; the file of interactions has {known}")
            self.interaction = self.interactions[str(name)]
            await _awaited(self.interaction.start_interaction(self.number, **self.interaction_options))
        return row["messages"], {"tools": [_schema_of(tool) for tool in self.tools.values()]}

    async def step(self, message: Message) -> tuple[list[Message], float, bool, bool, dict[str, object]]:
        """Answers of tools, or of the interaction, or the end."""
        self.num_turns += 1
        self.messages.append(dict(message))
        calls, is_over, answers = message.get("tool_calls"), False, list[Message]()
        if self.max_turns is not None and self.num_turns >= self.max_turns:
            return [], 0.0, True, False, self._metrics()
        if calls and self.tools:
            assert isinstance(calls, list)
            answers = list(await asyncio.gather(*map(self._answer, calls[: self.max_parallel_calls])))
        elif self.interaction is not None:
            given = self.interaction.generate_response(self.number, self.messages, **self.interaction_options)
            is_over, said, score, _ = await _awaited(given)
            self.scores += float(score or 0.0)
            answers = [{"role": "user", "content": said}]
        else:
            is_over = True
        self.messages += [dict(answer) for answer in answers]
        return answers, 0.0, is_over, False, self._metrics()

    async def close(self) -> None:
        """End the interaction."""
        if self.interaction is not None and callable(getattr(self.interaction, "finalize_interaction", None)):
            await _awaited(self.interaction.finalize_interaction(self.number))

    def _metrics(self) -> dict[str, object]:
        return {"tool_reward": self.tool_rewards, "turn_scores": self.scores}

    async def _answer(self, called: Mapping[str, Any]) -> Message:
        """One call, with an instance of its own."""
        name, tool, instance = str(called["function"]["name"]), None, None
        try:
            tool = self.tools[name]
            options = _mapping(self.agent_data.tools_kwargs.get(name))
            created = await _awaited(tool.create(create_kwargs=_mapping(options.get("create_kwargs"))))
            instance = created[0] if isinstance(created, tuple) else created
            taken = inspect.signature(tool.execute).parameters
            is_taken = "agent_data" in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values())
            more = {"agent_data": self.agent_data} if is_taken else {}
            result = await _awaited(tool.execute(instance, dict(called["function"]["arguments"]), **more))
            response, reward = (result[0], result[1]) if isinstance(result, tuple) else (result, 0.0)
            self.tool_rewards += float(reward or 0.0)
            text = self._shortened(_text_of(response))
        except Exception as error:
            text = f"Error when executing tool: {error}"
        finally:
            if tool is not None and instance is not None:
                await _awaited(tool.release(instance))
        return {"role": "tool", "name": name, "tool_call_id": called["id"], "content": text}

    def _shortened(self, text: str) -> str:
        half = self.most // 2
        middle = text[:half] + "...(truncated)..." + text[-half:]
        short = {"left": text[: self.most] + "...(truncated)", "right": "(truncated)..." + text[-self.most :]}
        return text if len(text) <= self.most else short.get(self.side, middle)


@cache
def tools_of(path: str) -> Mapping[str, Any]:
    """The tools of a file, by name, one object each as in verl."""
    tools = {}
    for entry in _entries(path, "tools"):
        schema = entry.get("tool_schema")
        tool = _class_of(entry, path)(_mapping(entry.get("config")), verl_names.Record(schema) if schema else None)
        tools[str(_schema_of(tool).get("function", {}).get("name"))] = tool
    return tools


@cache
def interactions_of(path: str) -> Mapping[str, Any]:
    """The interactions of a file, by name, one object each as in verl."""
    found = {}
    for entry in _entries(path, "interaction"):
        simple = str(entry["class_name"]).rpartition(".")[2]
        name = str(entry.get("name") or (simple.removesuffix("Interaction") or simple).lower())
        found[name] = _class_of(entry, path)({**_mapping(entry.get("config")), "name": name})
    return found


def _entries(path: str, section: str) -> list[Mapping[str, Any]]:
    with open(path, encoding="utf-8") as file:
        return list(yaml.safe_load(file)[section])


def _class_of(entry: Mapping[str, Any], path: str) -> Any:
    """The class that an entry names: `my_package.module.Class`, or `path/to/file.py:Class`."""
    named = str(entry["class_name"])
    verl_names.stand_in()
    if (parts := split_name(named)) is not None:
        return getattr(import_file(parts[0]), parts[1])
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, name = named.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        advice = f"write it as a class of your own with the same methods, and name that in {path} (docs/environments.md)"
        missing = f"{error}. {advice[0].upper()}{advice[1:]}" if named.startswith("verl.") else str(error)
        raise EpisodeError(f"{path}: class_name {named!r} cannot be imported: {missing}") from error


def _schema_of(tool: Any) -> dict[str, Any]:
    schema = tool.get_openai_tool_schema() if callable(getattr(tool, "get_openai_tool_schema", None)) else tool.tool_schema
    return dict(schema if isinstance(schema, Mapping) else schema.model_dump(exclude_unset=True))


def _text_of(response: Any) -> str:
    if isinstance(response, Mapping):
        response = response.get("text")
    elif not isinstance(response, str):
        if getattr(response, "image", None) or getattr(response, "video", None):
            raise TypeError("the tool answers with pictures, which are not read here; a text is needed")
        response = getattr(response, "text", response)
    return "" if response is None else str(response)


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
