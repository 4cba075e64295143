"""Ranges of numbers, for types such as `Annotated[float, SHARE]`, which are checked and documented with their range."""

from __future__ import annotations

from annotated_types import Interval

COUNT = Interval(ge=1)
NOT_NEGATIVE = Interval(ge=0)
FLOAT32 = Interval(ge=-3.4e38, le=3.4e38)
POSITIVE = Interval(gt=0)
SHARE = Interval(ge=0, le=1)
TOP_P = Interval(gt=0, le=1)
OPEN_SHARE = Interval(gt=0, lt=1)
BELOW_ONE = Interval(ge=0, lt=1)
AT_LEAST_TWO = Interval(ge=2)
ABOVE_ONE = Interval(gt=1)
TEMPERATURE = Interval(ge=0.01, le=2)
"""vLLM computes at 0.01 what is asked for below, and refuses more than 2."""
TEMPERATURE_OR_GREEDY = Interval(ge=0, le=2)
