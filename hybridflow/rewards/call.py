"""A reward function, built in or a user's: how it is found, which signature it has, and what it may return.

Two signatures are understood, told apart by their parameters:

    compute_score(reward_input, **options)                       one dict with response, ground_truth, data_source,
                                                                 extra_info and prompt
    compute_score(data_source, solution_str, ground_truth, extra_info=None, **options)

Either returns a number, or a dict with `overall` (or `score`) and more numbers, which become metrics. The module may say
`REWARD_TYPE = "batch"`: then the function gets a list of such dicts and returns a list of results.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal, SupportsFloat, TypedDict, cast

from hybridflow.config.reward_signature import SignatureError, call_for
from hybridflow.config.schema import RewardConfig
from hybridflow.errors import RewardError
from hybridflow.registry import REWARDS, load, nearest

Kind = Literal["sequential", "batch"]
MAIN_KEYS = ("overall", "score")
TAKEN_METRICS = ("mean", "std", "failed")
"""What `reward/...` says of the reward itself; see controller/batch_metrics.py."""


class RewardInput(TypedDict):
    """What a function is told about one response."""

    response: str
    ground_truth: object
    data_source: str
    extra_info: Mapping[str, object]
    prompt: str


@dataclass(frozen=True)
class Score:
    """The reward of one response, and the numbers that the function returned beside it."""

    reward: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RewardFunction:
    """A loaded function that can be called in one way, whatever its signature."""

    name: str
    """`REWARD_NAME` of its module, or the function's name; for logs."""
    kind: Kind
    call: Callable[[object], object]
    """Takes a RewardInput, or a list of them where `kind` is batch."""

    def score(self, reward_input: RewardInput) -> Score:
        """The score of one response, by a sequential function.

        Raises:
            TypeError, ValueError: the function returned something else than a finite number or a dict of numbers.
        RewardError: it returned a number under a name that is taken.
        """
        return _as_score(self.call(dict(reward_input)))

    def score_all(self, reward_inputs: Sequence[RewardInput]) -> list[Score]:
        """The scores of all responses, by a batch function. Raises as `score` does."""
        results = self.call([dict(reward_input) for reward_input in reward_inputs])
        if isinstance(results, str | Mapping) or not isinstance(results, Sequence):
            raise TypeError(f"a batch function returns a list of one result per response; this one returned {_kind(results)}")
        if len(results) != len(reward_inputs):
            raise ValueError(f"the batch function got {len(reward_inputs)} responses and returned {len(results)} results")
        return [_as_score(result) for result in results]


def load_reward_function(config: RewardConfig) -> RewardFunction:
    """The function that `reward.path` and `reward.function` name, or else `reward.name`. Imports its module.

    Raises:
        RewardError: there is no such file or function, its import fails, or its signature is neither of the two.
        ConfigError: `reward.name` is not known.
    """
    if config.path is None:
        function = load(config.name, REWARDS, key="reward.name")
        asked = f"reward.name={config.name!r}"
        module = sys.modules[(REWARDS.get(config.name, config.name)).partition(":")[0]]
    else:
        module = _import_file(config.path)
        asked = f"reward.path={config.path!r}"
        if config.function not in vars(module):
            raise RewardError(f"{asked}: the file has no function {config.function!r}{nearest(config.function, vars(module))}")
        function = vars(module)[config.function]
    if not callable(function):
        raise RewardError(f"{asked}: {config.function!r} is {_kind(function)}, not a function")
    kind = _reward_type(module, asked)
    name = vars(module).get("REWARD_NAME", config.function if config.path else config.name)
    return RewardFunction(str(name), kind, _uniform(function, kind, config.options, asked))


def _import_file(path: str) -> ModuleType:
    """The module in the file; files beside it can be imported by it."""
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        siblings = [entry.name for entry in file.parent.iterdir()] if file.parent.is_dir() else []
        raise RewardError(f"reward.path={path!r}: there is no such file{nearest(file.name, siblings)}")
    name = f"hybridflow_user_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RewardError(f"reward.path={path!r}: is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look the module up by its name
    sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward.path={path!r}: the file does not import: {type(error).__name__}: {error}") from error
    return module


def _reward_type(module: ModuleType, asked: str) -> Kind:
    found = vars(module).get("REWARD_TYPE", "sequential")
    if found not in ("sequential", "batch"):
        raise RewardError(f"{asked}: REWARD_TYPE is {found!r}; it must be 'sequential' or 'batch'")
    return cast(Kind, found)


def _uniform(
    function: Callable[..., object], kind: Kind, options: Mapping[str, object], asked: str
) -> Callable[[object], object]:
    """A function of one argument that calls `function` in the way that its signature asks for."""
    try:
        way = call_for(inspect.signature(function).parameters, options, is_batch=kind == "batch")
    except SignatureError as error:
        raise RewardError(f"{asked}: {error}") from error
    if way.style == "one":
        return lambda given: function(given, **options)
    if way.style == "by_name":
        return lambda given: function(**{name: _argument(given, name) for name in way.arguments}, **options)
    return lambda given: function(*[_argument(given, name) for name in way.arguments], **options)


def _argument(given: object, name: str) -> object:
    """One of the four arguments."""
    reward_input = cast(Mapping[str, object], given)
    return reward_input["response" if name == "solution_str" else name]


def _as_score(result: object) -> Score:
    if isinstance(result, Mapping):
        main = next((key for key in MAIN_KEYS if key in result), None)
        if main is None:
            raise TypeError(f"the function returned a dict with {sorted(map(str, result))}; it needs 'overall' or 'score'")
        metrics = {str(name): float(value) for name, value in result.items() if isinstance(value, SupportsFloat)}
        if taken := [name for name in TAKEN_METRICS if name in metrics]:
            found = f"the reward function returned a number called {taken[0]!r}, but reward/{taken[0]} is of the reward itself"
            raise RewardError(f"{found}. Give it another name than {', '.join(TAKEN_METRICS)}")
        return Score(_finite(result[main]), metrics)
    return Score(_finite(result))


def _finite(value: object) -> float:
    if isinstance(value, str) or not isinstance(value, SupportsFloat):
        raise TypeError(f"the function returned {_kind(value)}; expected a number, or a dict with 'overall' and more numbers")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the function returned {number}; a reward must be finite")
    return number


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__} ({value!r:.80})"
