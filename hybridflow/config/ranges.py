"""The allowed values of numbers. An option of an algorithm has its own in its type: `Annotated[float, SHARE]`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
    """The allowed values of a number."""

    low: float = -math.inf
    high: float = math.inf
    is_low_allowed: bool = True
    is_high_allowed: bool = True

    def __contains__(self, value: float) -> bool:
        is_above = value > self.low or (self.is_low_allowed and value == self.low)
        return is_above and (value < self.high or (self.is_high_allowed and value == self.high))

    def __str__(self) -> str:
        low = f"{'at least' if self.is_low_allowed else 'more than'} {self.low:g}" if self.low > -math.inf else ""
        high = f"{'at most' if self.is_high_allowed else 'less than'} {self.high:g}" if self.high < math.inf else ""
        return " and ".join(part for part in (low, high) if part)


COUNT = Range(low=1)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, is_low_allowed=False)
SHARE = Range(low=0, high=1)
TOP_P = Range(low=0, high=1, is_low_allowed=False)
OPEN_SHARE = Range(low=0, high=1, is_low_allowed=False, is_high_allowed=False)
BELOW_ONE = Range(low=0, high=1, is_high_allowed=False)
AT_LEAST_TWO = Range(low=2)
ABOVE_ONE = Range(low=1, is_low_allowed=False)
TEMPERATURE = Range(low=0.01, high=2)
"""vLLM computes at 0.01 what is asked for below, and refuses more than 2."""
TEMPERATURE_OR_GREEDY = Range(low=0, high=2)
