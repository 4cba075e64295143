"""What files of tools and interactions that were written for verl import from it, where verl is not installed.

Such files subclass `verl.tools.base_tool.BaseTool` or `verl.interactions.base.BaseInteraction` and need little else.
`stand_in` puts these few names where Python looks for verl's; it is called in the processes of environments and nowhere else.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any, TypeVar
from uuid import uuid4

Function = TypeVar("Function", bound=Callable[..., object])


class Record:
    """A mapping whose entries are attributes, and those of mappings in it: `schema.function.name`."""

    def __init__(self, entries: Mapping[str, object] | None = None, **more: object):
        self.entries = {**(entries or {}), **more}

    def __getattr__(self, name: str) -> Any:
        try:
            value = self.__dict__["entries"][name]
        except KeyError as error:
            raise AttributeError(f"there is no {name!r}") from error
        return Record(value) if isinstance(value, Mapping) and name != "properties" else value

    @classmethod
    def model_validate(cls, entries: Mapping[str, object]) -> Record:
        """Of a plain mapping, as pydantic's models are made."""
        return cls(entries)

    def model_dump(self, **_: object) -> dict[str, object]:
        """The plain mapping, at any depth; how pydantic would leave entries out does not matter, since none is added."""
        return dict(json.loads(json.dumps(self.entries, default=attrgetter("entries"))))


class ToolResponse:
    """What a tool has to say."""

    def __init__(self, text: str | None = None, image: Sequence[object] | None = None, video: Sequence[object] | None = None):
        self.text, self.image, self.video = text, image, video


class BaseTool:
    """One object for all episodes of a process; an episode's call has an `instance_id`."""

    def __init__(self, config: dict[str, object], tool_schema: Record | None):
        self.config = config
        self.tool_schema = tool_schema or self.get_openai_tool_schema()
        self.name = str(self.tool_schema.function.name)

    def get_openai_tool_schema(self) -> Record:
        """The schema, where the YAML has none and a subclass makes it."""
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **_: object) -> tuple[str, ToolResponse]:
        """Begin a call."""
        return instance_id or str(uuid4()), ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **_: object) -> tuple[object, float, dict[str, Any]]:
        """What the model hears, a reward and metrics."""
        return ToolResponse(text="Updated the tool state."), 0.0, {}

    async def calc_reward(self, instance_id: str, **_: object) -> float:
        """Of the tool's state; verl's loop of agents never asks for it."""
        return 0.0

    async def release(self, instance_id: str, **_: object) -> None:
        """End a call."""


class BaseInteraction:
    """One object for all episodes of a process; an episode has an `instance_id`."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.name = str(config.get("name", "interaction_agent"))

    async def start_interaction(self, instance_id: str | None = None, **_: object) -> str:
        """Begin an episode."""
        return instance_id or str(uuid4())

    async def generate_response(
        self, instance_id: str, messages: list[dict[str, Any]], **_: object
    ) -> tuple[bool, str, float, dict[str, Any]]:
        """Whether the episode is over, what the model hears, a score, and metrics."""
        return False, "Your current result seems acceptable.", 0.8, {}

    async def calculate_score(self, instance_id: str | None = None, **_: object) -> float:
        """Of the episode so far."""
        return 0.0

    async def finalize_interaction(self, instance_id: str | None = None, **_: object) -> None:
        """End an episode."""


def gsm8k_score(
    solution_str: str, ground_truth: str, method: str = "strict", format_score: float = 0.0, score: float = 1.0
) -> float:
    """verl's rule of GSM8K: the number behind the last `####`, or with `flexible` the last number, equals the truth as text."""
    text = solution_str[-300:]
    if method == "strict":
        found = [number.replace(",", "").replace("$", "") for number in re.findall(r"#### (\-?[0-9\.\,]+)", text)]
    else:
        found = [number for number in re.findall(r"(\-?[0-9\.\,]+)", text) if number != "."]
    return 0.0 if not found else score if found[-1] == ground_truth else format_score


class Gsm8kTool(BaseTool):
    """As verl's `verl.tools.gsm8k_tool.Gsm8kTool`: tells the model whether its answer is right."""

    def __init__(self, config: dict[str, object], tool_schema: Record | None):
        super().__init__(config, tool_schema)
        self.truths: dict[str, str] = {}
        self.rewards: dict[str, float] = {}

    async def create(self, instance_id: str | None = None, **given: Any) -> tuple[str, ToolResponse]:
        """Begin with the row's ground truth."""
        number = instance_id or str(uuid4())
        created = given.get("create_kwargs", {})
        self.truths[number] = str(given.get("ground_truth", created.get("ground_truth")))
        self.rewards[number] = 0.0
        return number, ToolResponse()

    async def execute(self, instance_id: str, parameters: dict[str, Any], **_: object) -> tuple[object, float, dict[str, Any]]:
        """Its reward is -0.05 for an answer that is no better than the one before."""
        answer = str(parameters.get("answer", ""))
        solution = answer if answer.startswith("#### ") else f"#### {answer}"
        reward = gsm8k_score(solution, self.truths[instance_id], "flexible")
        tool_reward = 0.0 if reward > self.rewards[instance_id] else -0.05
        self.rewards[instance_id] = reward
        return ToolResponse(text=f"Current parsed {answer=} {reward=}"), tool_reward, {}

    async def release(self, instance_id: str, **_: object) -> None:
        """Forget the call."""
        del self.truths[instance_id], self.rewards[instance_id]


class Gsm8kInteraction(BaseInteraction):
    """As verl's `verl.interactions.gsm8k_interaction.Gsm8kInteraction`: asks again until the answer is right."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self.truths: dict[str, str] = {}

    async def start_interaction(self, instance_id: str | None = None, **given: Any) -> str:
        """Begin with the row's ground truth."""
        number = await super().start_interaction(instance_id)
        self.truths[number] = str(given.get("ground_truth"))
        return number

    async def generate_response(
        self, instance_id: str, messages: list[dict[str, Any]], **_: object
    ) -> tuple[bool, str, float, dict[str, Any]]:
        """Judge the model's last message."""
        said = str(next((message.get("content") or "" for message in reversed(messages) if message["role"] == "assistant"), ""))
        score = gsm8k_score(said if said.startswith("#### ") else f"#### {said}", self.truths[instance_id], "flexible")
        wrong = "Your response is incorrect! You need to reflect on your answer and try again."
        return score == 1.0, "Your response is correct!" if score == 1.0 else wrong, score, {}

    async def finalize_interaction(self, instance_id: str | None = None, **_: object) -> None:
        """Forget the episode."""
        self.truths.pop(str(instance_id), None)


def rollout_trace_op(function: Function) -> Function:
    """verl's mark of what is traced; here it changes nothing."""
    return function


NAMES: Mapping[str, Mapping[str, object]] = {
    "verl.tools.base_tool": {"BaseTool": BaseTool},
    "verl.tools.schemas": {
        "ToolResponse": ToolResponse,
        "OpenAIFunctionToolSchema": Record,
        "OpenAIFunctionSchema": Record,
        "OpenAIFunctionParametersSchema": Record,
        "OpenAIFunctionPropertySchema": Record,
    },
    "verl.tools.gsm8k_tool": {"Gsm8kTool": Gsm8kTool},
    "verl.interactions.base": {"BaseInteraction": BaseInteraction},
    "verl.interactions.gsm8k_interaction": {"Gsm8kInteraction": Gsm8kInteraction},
    "verl.utils.rollout_trace": {"rollout_trace_op": rollout_trace_op},
    "verl.utils.reward_score.gsm8k": {"compute_score": gsm8k_score},
}
"""Modules of verl's that there is something for, with what is in them."""


def stand_in() -> None:
    """Where verl is not installed, make what is here importable under its names."""
    if "verl" in sys.modules or importlib.util.find_spec("verl") is not None:
        return
    for path, names in NAMES.items():
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            name = ".".join(parts[:length])
            if name not in sys.modules:
                module = sys.modules[name] = ModuleType(name, "Stands for verl's module of this name.")
                module.__path__ = []
                if length > 1:
                    setattr(sys.modules[".".join(parts[: length - 1])], parts[length - 1], module)
        vars(sys.modules[path]).update(names)
