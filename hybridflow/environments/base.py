"""What an environment is, and how a user's class is found.

An environment is an ordinary class; one object of it is one episode. Its methods are plain or `async`:

    reset(row) -> (messages, info)
    step(message) -> (messages, reward, terminated, truncated, info)
    close()                                    if it has one

An agent that speaks to an OpenAI-compatible address is a function `run(row, address)` or a class with such a method; it returns
the reward of its episode (environments/sessions.py).

Imports no torch: the processes that environments run in load it.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import SupportsFloat, SupportsIndex, TypedDict

from hybridflow import registry
from hybridflow.config.schema import EnvironmentConfig
from hybridflow.errors import EpisodeError, UserFileError
from hybridflow.user_file import import_file

Message = Mapping[str, object]
"""As in chat templates: `role`, `content`, and `tool_calls` where a model calls tools."""


NEW_HISTORY = "new_history"
"""In the info of `step`: its messages are the whole conversation from now on, in place of what was said before."""
TAKEN = frozenset({"turns", "histories"})
"""Metrics of every environment, which an info cannot name."""
MOST_REWARD = 1e30
"""Sums of rewards and their squares are taken in float32 and float64."""


class Row(TypedDict):
    """What `reset` is given of the dataset's row."""

    messages: list[Message]
    """The prompt as chat messages."""
    ground_truth: object
    data_source: str
    extra_info: Mapping[str, object]
    seed: int
    """The same for all episodes of a prompt in a step, another in the next step."""
    sample: int
    """Number of the episode among those of its prompt."""


@dataclass(frozen=True)
class Opening:
    """What `reset` has given."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    """JSON schemas of tools, for the chat template: `info["tools"]`."""


@dataclass(frozen=True)
class Outcome:
    """What `step` has given."""

    messages: tuple[Message, ...]
    reward: float
    terminated: bool
    truncated: bool
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The numbers in `info`."""
    tools: tuple[Mapping[str, object], ...] | None = None
    """Of a new history; None where it goes on."""

    @property
    def has_ended(self) -> bool:
        return self.terminated or self.truncated


def opening_of(result: object) -> Opening:
    """What `reset` returned, checked.

    Raises:
        TypeError, ValueError: it is something else than (messages, info) with at least one message.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"reset returned {_kind(result)}; expected (messages, info)")
    messages, info = result
    if not (found := _messages(messages, "reset")):
        raise ValueError("reset returned no messages; an episode begins with at least one")
    return Opening(found, _tools(_info(info, "reset"), "reset"))


def outcome_of(result: object) -> Outcome:
    """What `step` returned, checked.

    Raises:
        TypeError, ValueError: it is something else than (messages, reward, terminated, truncated, info), the reward is not
            finite, or the episode goes on without a message.

    Example:
        >>> outcome_of(([], 1, True, False, {"solved": 1})).metrics
        {'solved': 1.0}
    """
    if not isinstance(result, tuple) or len(result) != 5:
        raise TypeError(f"step returned {_kind(result)}; expected (messages, reward, terminated, truncated, info)")
    messages, reward, terminated, truncated, info = result
    if reward is not None and (isinstance(reward, str) or not isinstance(reward, SupportsFloat)):
        raise TypeError(f"step returned the reward {reward!r:.80}; expected a number, or None for 0")
    number = 0.0 if reward is None else float(reward)
    if not math.isfinite(number) or abs(number) > MOST_REWARD:
        raise ValueError(f"step returned the reward {number}; it must be finite, and at most {MOST_REWARD:g}")
    for name, said in (("terminated", terminated), ("truncated", truncated)):
        if isinstance(said, str | Sequence | Mapping):
            raise TypeError(f"step returned {_kind(said)} as {name}; expected True or False")
    found = _messages(messages, "step")
    if not found and not (terminated or truncated):
        raise ValueError("step returned no messages and neither terminated nor truncated: the policy has nothing to answer")
    known = _info(info, "step")
    metrics = {
        str(key): float(value) for key, value in known.items() if isinstance(value, SupportsFloat) and key != NEW_HISTORY
    }
    if taken := TAKEN.intersection(metrics):
        raise ValueError(
            f"the info of step has {sorted(taken)[0]!r}, which is a metric of every environment. Name it otherwise"
        )
    tools = _tools(known, "step") if known.get(NEW_HISTORY) else None
    return Outcome(found, number, bool(terminated), bool(truncated), metrics, tools)


def _messages(messages: object, method: str) -> tuple[Message, ...]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"{method} returned {_kind(messages)} as messages; expected a list of dicts with role and content")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise TypeError(f"{method} returned the message {message!r:.120}; expected a dict with role and content")
        _check_content(message["content"], method)
    return _plain(messages, f"{method} returned messages")


def _check_content(content: object, method: str) -> None:
    """Text, None beside calls of tools, or OpenAI's list of parts that are text."""
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": "" if content is None else content}]
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise TypeError(
                f"{method} returned {_kind(content)} as the content of a message; expected text: nothing else is read"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            problem = "which is no text: decode bytes with errors='replace'"
            raise ValueError(f"{method} returned a content with {text[error.start]!a}, {problem}") from error


def _info(info: object, method: str) -> Mapping[str, object]:
    if info is None or isinstance(info, Mapping):
        return info or {}
    raise TypeError(f"{method} returned {_kind(info)} as info; expected a dict")


def _tools(info: Mapping[str, object], method: str) -> tuple[Mapping[str, object], ...]:
    tools = info.get("tools") or ()
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TypeError(f"{method} returned {_kind(tools)} as the tools of its info; expected a list of JSON schemas")
    return _plain(tools, f"{method} returned tools")


def _plain(dicts: Sequence[Mapping[str, object]], what: str) -> tuple[Mapping[str, object], ...]:
    """Dicts of what JSON has, as which they travel to another process and into chat templates: classes of the user's own file,
    be they text, are known in this process alone."""
    try:
        return tuple(json.loads(json.dumps(list(dicts), default=_of_json)))
    except Exception as error:  # whatever the object raises where it is read
        raise TypeError(f"{what} that are no JSON: {error}") from error


def _of_json(value: object) -> object:
    """One step towards JSON of what is close to it: mappings, arrays, sets, and numbers of numpy."""
    match value:
        case Mapping():
            return dict(value)
        case Collection() if not isinstance(value, bytes | bytearray | memoryview):
            return list(value)
        case SupportsIndex():
            return operator.index(value)
        case SupportsFloat():
            return float(value)
    raise TypeError(_kind(value))


def load_environment(config: EnvironmentConfig) -> Callable[[], object]:
    """What makes the environment of one episode: the class that the configuration names, with its options.

    Raises:
        EpisodeError: there is no such file or class, it does not import, or it lacks a method.
        ConfigError: `environment.name` cannot be imported.
    """
    if config.path is not None:
        asked = f"environment.path={config.path!r}"
        try:
            found = _class_in(import_file(config.path), config.class_name, asked)
        except UserFileError as error:
            raise EpisodeError(f"{asked}: {error}") from error
    else:
        assert config.name is not None, "config/rules asks for one of the two"
        asked = f"environment.name={config.name!r}"
        found = registry.load(config.name, {}, key="environment.name")
    if not callable(found):
        raise EpisodeError(f"{asked}: is {_kind(found)}; expected a class with reset and step")
    if _is_agent(found):
        return _agent(found, config.options, asked)
    missing = [name for name in ("reset", "step") if not callable(getattr(found, name, None))]
    if missing and inspect.isclass(found):
        raise EpisodeError(f"{asked}: class {found.__name__} has no method {' and no '.join(missing)}")
    make, options = found, dict(config.options)
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:
        raise EpisodeError(f"{asked}: environment.options do not fit: {error}") from error
    return lambda: make(**options)


def _is_agent(found: object) -> bool:
    """Whether it is a function, or a class whose objects run by themselves."""
    has_steps = callable(getattr(found, "step", None))
    return inspect.isfunction(found) or (callable(getattr(found, "run", None)) and not has_steps)


def _agent(found: Callable[..., object], options: Mapping[str, object], asked: str) -> Callable[[], object]:
    """What makes the environment of one run of an agent: `run(row, address)`, a function or a method."""
    try:
        from hybridflow.environments.sessions import AgentEnvironment
    except ImportError as error:
        problem = f"an agent needs the package aiohttp, which does not import: {error}. pip install 'hybridflow[agents]'"
        raise EpisodeError(f"{asked}: {problem}") from error
    is_class = inspect.isclass(found)
    parameters = inspect.signature(found).parameters
    try:
        inspect.signature(found).bind(*(() if is_class else (None, "")), **options)
    except TypeError as error:
        takes = f"it takes ({', '.join(parameters)})"
        problem = f"an agent is run(row, address), with environment.options: {error}; {takes}"
        raise EpisodeError(f"{asked}: {problem}") from error
    if not is_class:
        return lambda: AgentEnvironment(functools.partial(found, **options))
    return lambda: AgentEnvironment(found(**options).run)  # type: ignore[attr-defined]


def _class_in(module: ModuleType, name: str | None, asked: str) -> object:
    """The class of that name, or the only environment that the file itself defines."""
    own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
    if name is not None:
        if name not in vars(module):
            raise EpisodeError(f"{asked}: the file has no class {name!r}{registry.nearest(name, own)}")
        return vars(module)[name]
    fitting = [key for key, value in own.items() if inspect.isclass(value) and (hasattr(value, "step") or _is_agent(value))]
    if not fitting and inspect.isfunction(own.get("run")):
        return own["run"]
    if len(fitting) != 1:
        listed = f"has {', '.join(fitting)}" if fitting else "has no class with reset and step, and no agent's run"
        raise EpisodeError(f"{asked}: the file {listed}. Name one in environment.class_name")
    return own[fitting[0]]


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__} ({value!r:.80})"
