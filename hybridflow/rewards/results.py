"""What a reward function returned, as a score: numbers of any library, lists and arrays of any library."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, SupportsFloat, cast, runtime_checkable

import numpy as np

from hybridflow.errors import RewardError
from hybridflow.guardian import shortened

MAIN_KEYS = ("overall", "score")
TAKEN_METRICS = ("mean", "std", "failed")
"""What `reward/...` says of the reward itself; see controller/batch_metrics.py."""
CALLING = ("rewards/scorer.py", "rewards/call.py", "rewards/results.py", "concurrent/futures/_base.py", "asyncio/timeouts.py")
"""Files between the pool and the function that is called."""


@dataclass(frozen=True)
class Score:
    """The reward of one response, and the numbers that the function returned beside it."""

    reward: float
    """Finite, also as the float32 that it becomes."""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A response that could not be scored."""

    reason: Literal["raised", "timed out", "died"]
    detail: str
    """Traceback, or what happened to the process."""

    @property
    def cause(self) -> str:
        """The last line: what was raised, without where."""
        return self.detail.rstrip().rpartition("\n")[2]


@runtime_checkable
class Arraylike(Protocol):
    """An array of numpy, a tensor of torch, a column of pandas: what becomes Python's own numbers and lists by itself."""

    def tolist(self) -> object:
        """As Python's own numbers and lists."""
        ...


def trace_of(error: BaseException) -> str:
    """The traceback from the function on; of what this package says about its result, the message alone."""
    rest = error.__traceback__
    while rest is not None and rest.tb_frame.f_code.co_filename.endswith(CALLING):
        rest = rest.tb_next
    return shortened("".join(traceback.format_exception(type(error), error, rest)))


def as_list(results: object, num_inputs: int) -> Sequence[object]:
    """What a function of many responses returned, as one result for each.

    Raises:
        TypeError, ValueError: it is no list or array, or has another length.
    """
    plain = results.tolist() if isinstance(results, Arraylike) else results
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Iterable):
        raise TypeError(f"a batch function returns a list of one result per response; this one returned {kind_of(results)}")
    listed = [_only(result) if plain is not results else result for result in plain]
    if len(listed) != num_inputs:
        raise ValueError(f"the batch function got {num_inputs} responses and returned {len(listed)} results")
    return listed


def as_score(result: object) -> Score:
    """A number, or a dict with `overall` or `score`, as a score. Entries of the dict that are no numbers are left out.

    Raises:
        TypeError, ValueError: it is neither, or not finite.
        RewardError: a number has a name that is taken.
    """
    if not isinstance(result, Mapping):
        return Score(finite(result))
    main = next((key for key in MAIN_KEYS if key in result), None)
    if main is None:
        raise TypeError(f"the function returned a dict with {sorted(map(str, result))}; it needs 'overall' or 'score'")
    numbers = {str(name): _number(value) for name, value in result.items()}
    metrics = {name: number for name, number in numbers.items() if number is not None}
    if taken := [name for name in TAKEN_METRICS if name in metrics]:
        found = f"the reward function returned a number called {taken[0]!r}, but reward/{taken[0]} is of the reward itself"
        raise RewardError(f"{found}. Give it another name than {', '.join(TAKEN_METRICS)}")
    return Score(finite(result[main], key=main), metrics)


def finite(value: object, *, key: str | None = None) -> float:
    """The number, which must be finite as float32: rewards are float32 from here on.

    Raises:
        TypeError, ValueError: it is no number, or not finite.
    """
    number = None if isinstance(value, str) else _number(value)
    if number is None:
        found = f"{kind_of(value)} as {key!r}" if key else kind_of(value)
        raise TypeError(f"the function returned {found}; expected a number, or a dict with 'overall' and more numbers")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(number)):
            raise ValueError(f"the function returned {number:g}; a reward must be finite, and at most 3.4e38 as float32")
    return number


def _number(value: object) -> float | None:
    """The value as a float; None where it is no single number. Nothing that a value does when it is asked gets out."""
    try:
        if isinstance(value, Arraylike):
            value = _only(value.tolist())
        return float(value) if isinstance(value, SupportsFloat) and not isinstance(value, str) else None
    except OverflowError:  # an integer beyond all floats
        return float("inf")
    except Exception:
        return None


def _only(value: object) -> object:
    """The one number of an array of one, whatever its dimensions."""
    while isinstance(value, list) and len(value) == 1:
        value = cast(object, value[0])
    return value


def kind_of(value: object) -> str:
    """What was found, for messages: equal ones for equal mistakes, wherever objects lie in memory."""
    return "None" if value is None else f"a {type(value).__name__} ({re.sub(r' at 0x[0-9a-f]+', '', f'{value!r:.100}'):.80})"
