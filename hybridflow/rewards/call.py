"""A reward function, built in or a user's: how it is found, which signature it has, and what it is called with.

Three signatures are understood, told apart by their parameters:

    compute_score(reward_input, **options)                       one dict with response, ground_truth, data_source,
                                                                 extra_info, prompt and more: see RewardInput
    compute_score(data_source, solution_str, ground_truth, extra_info=None, **options)
    reward(completions, prompts=..., **columns)                  TRL's: columns of many responses, a list of numbers

Each returns a number, or a dict with `overall` (or `score`) and more numbers, which become metrics; `async def` is awaited.
The module may say `REWARD_TYPE = "batch"`: then the first gets a list of such dicts and returns a list of results.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypedDict, cast

from hybridflow.config.reward_signature import CallStyle, SignatureError, call_for
from hybridflow.config.schema import RewardConfig, RewardTerm
from hybridflow.errors import RewardError, UserFileError
from hybridflow.registry import REWARDS, load, nearest
from hybridflow.rewards.results import Score, as_list, as_score, kind_of
from hybridflow.user_file import import_file, split_name

Kind = Literal["sequential", "batch"]
Messages = Sequence[Mapping[str, object]]


class RewardInput(TypedDict):
    """What a function is told about one response."""

    response: str
    ground_truth: object
    data_source: str
    extra_info: Mapping[str, object]
    prompt: str
    """As the model reads it, chat template applied."""
    messages: Messages
    """The prompt as chat messages; one of role user where the dataset has plain text."""
    conversation: Messages
    """Those and the response, as one more message; of an episode, all of it."""
    response_tokens: int
    truncated: bool
    """Whether the length limit ended the response."""


@dataclass(frozen=True)
class RewardFunction:
    """A loaded function that can be called in one way, whatever its signature."""

    name: str
    """`REWARD_NAME` of its module, or the function's name; for logs."""
    kind: Kind
    call: Callable[[object], object]
    """Takes a RewardInput, or a list of them where `kind` is batch."""
    is_async: bool = False
    """Whether calls give awaitables, of which many may be under way at once."""
    concurrency: int | None = None
    """Most calls at once in a process, where the module says so by `MAX_CONCURRENCY`."""

    def score(self, reward_input: RewardInput) -> Score:
        """The score of one response, by a sequential function.

        Raises:
            TypeError, ValueError: the function returned something else than a finite number or a dict of numbers.
            RewardError: it returned a number under a name that is taken.
        """
        return as_score(_waited_for(self.call(dict(reward_input))))

    def score_all(self, reward_inputs: Sequence[RewardInput]) -> list[Score]:
        """The scores of all responses, by a batch function. Raises as `score` does."""
        results = _waited_for(self.call([dict(reward_input) for reward_input in reward_inputs]))
        return [as_score(result) for result in as_list(results, len(reward_inputs))]


def _waited_for(result: object) -> object:
    async def wait() -> object:
        return await cast(Awaitable[object], result)

    return asyncio.run(wait()) if inspect.isawaitable(result) else result


def load_reward_function(term: RewardTerm | RewardConfig) -> RewardFunction:
    """The function that `path` and `function`, or else `name`, of a term name. Imports its module.

    Raises:
        RewardError: there is no such file or function, its import fails, or its signature is none that is known.
        ConfigError: `name` is not known.
    """
    in_file = (term.path, term.function) if term.path is not None else split_name(term.name)
    if in_file is None:
        function = load(term.name, REWARDS, key="reward.name")
        asked = f"reward.name={term.name!r}"
        module = sys.modules[(REWARDS.get(term.name, term.name)).partition(":")[0]]
    else:
        path, attribute = in_file
        asked = f"reward.path={path!r}"
        try:
            module = import_file(path)
        except UserFileError as error:
            raise RewardError(f"{asked}: {error}") from error
        if attribute not in vars(module):
            raise RewardError(f"{asked}: the file has no function {attribute!r}{nearest(attribute, vars(module))}")
        function = vars(module)[attribute]
    if not callable(function):
        raise RewardError(f"{asked}: {term.function!r} is {kind_of(function)}, not a function")
    return _uniform(function, module, term, asked)


def _reward_type(module: ModuleType, asked: str) -> Kind:
    found = vars(module).get("REWARD_TYPE", "sequential")
    if found not in ("sequential", "batch"):
        raise RewardError(f"{asked}: REWARD_TYPE is {found!r}; it must be 'sequential' or 'batch'")
    return cast(Kind, found)


def _uniform(
    function: Callable[..., object], module: ModuleType, term: RewardTerm | RewardConfig, asked: str
) -> RewardFunction:
    """A function of one argument that calls `function` in the way that its signature asks for."""
    kind = _reward_type(module, asked)
    try:
        way = call_for(inspect.signature(function).parameters, term.options, is_batch=kind == "batch")
    except SignatureError as error:
        raise RewardError(f"{asked}: {error}") from error
    name = vars(module).get("REWARD_NAME", term.function if term.path is not None else term.name)
    concurrency = vars(module).get("MAX_CONCURRENCY")
    return RewardFunction(
        str(name),
        "batch" if way.style == "columns" else kind,
        _caller(function, way, term.options),
        is_async=_is_coroutine_function(function),
        concurrency=int(concurrency) if concurrency else None,
    )


def _is_coroutine_function(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _caller(function: Callable[..., object], way: CallStyle, options: Mapping[str, object]) -> Callable[[object], object]:
    match way.style:
        case "one":
            return lambda given: function(given, **options)
        case "by_name":
            return lambda given: function(**{name: _argument(given, name) for name in way.arguments}, **options)
        case "by_place":
            return lambda given: function(*[_argument(given, name) for name in way.arguments], **options)
        case "columns":
            return lambda given: function(**_columns(cast(Sequence[RewardInput], given), way, options), **options)


def _argument(given: object, name: str) -> object:
    """One of the four arguments."""
    reward_input = cast(Mapping[str, object], given)
    return reward_input["response" if name == "solution_str" else name]


def _columns(inputs: Sequence[RewardInput], way: CallStyle, options: Mapping[str, object]) -> dict[str, object]:
    """TRL's keyword arguments: prompts and completions, as messages where a template was applied, and the dataset's columns.

    Raises:
        RewardError: the function needs a column that the dataset does not have.
    """
    columns: dict[str, object] = {
        name: [given["extra_info"].get(name) for given in inputs] for given in inputs for name in given["extra_info"]
    }
    columns |= {
        "prompts": [given["messages"] if _is_chat(given) else given["prompt"] for given in inputs],
        "completions": [
            [{"role": "assistant", "content": given["response"]}] if _is_chat(given) else given["response"] for given in inputs
        ],
        "ground_truth": [given["ground_truth"] for given in inputs],
        "data_source": [given["data_source"] for given in inputs],
        "extra_info": [given["extra_info"] for given in inputs],
    }
    if missing := [name for name in way.arguments if name not in columns and name not in options]:
        raise RewardError(
            f"the reward function needs a column {missing[0]!r}, which the dataset's extra_info does not have. It is given: "
            f"{', '.join(columns)}. Write it to extra_info, or set reward.options.{missing[0]}"
        )
    if way.takes_any:
        return {name: value for name, value in columns.items() if name not in options}
    return {name: value for name, value in columns.items() if name in way.allowed and name not in options}


def _is_chat(given: RewardInput) -> bool:
    """Whether the model has read messages by its chat template, and not plain text."""
    return [message["content"] for message in given["messages"]] not in ([], [given["prompt"]])
