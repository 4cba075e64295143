"""Ground truths that no answer can match: found in the dataset, before anything is generated for them.

Only the rules of this package are asked: what a function of the user's does with a ground truth is its own affair. A rule says
what it cannot match by a function `why_unmatchable(ground_truth, data_source)` beside it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import cast

from hybridflow.config.schema import RewardConfig
from hybridflow.errors import DataError
from hybridflow.registry import REWARDS

Why = Callable[[object, str], str | None]


def check_ground_truths(config: RewardConfig, rows: Iterable[tuple[int, object, str]], *, key: str) -> None:
    """`rows` are the number, ground truth and data source of each row of the files that `key` names.

    Raises:
        DataError: no answer can match the ground truth of a row; the first one is named, and how many there are.
    """
    checks = [(term.data_sources, why) for term in config.terms if term.path is None and (why := why_of(term.name))]
    if not checks:
        return
    problems = []
    for number, ground_truth, source in rows:
        for patterns, why in checks:
            if (not patterns or any(fnmatchcase(source, each) for each in patterns)) and (problem := why(ground_truth, source)):
                problems.append(f"row {number} (data_source {source!r}): column 'reward_model.ground_truth' is {problem}")
    if problems:
        more = f" So it is in {len(problems) - 1} other rows." if len(problems) > 1 else ""
        raise DataError(f"{key}: {problems[0]}.{more} No answer can match that: correct the file, or set another reward.name")


def why_of(name: str) -> Why | None:
    """What the module of a built-in rule says of ground truths; None where it says nothing."""
    if name not in REWARDS:
        return None
    return cast("Why | None", vars(importlib.import_module(REWARDS[name].partition(":")[0])).get("why_unmatchable"))


def why_no_text(ground_truth: object) -> str | None:
    """Why a value cannot be an answer as text: it is none, no single value, or blank."""
    match ground_truth:
        case None:
            return "null"
        case str() if not ground_truth.strip():
            return "blank"
        case str() | int():
            return None
        case float() if math.isnan(ground_truth):
            return "not a number"
        case float():
            return None
        case _:
            return f"{ground_truth!r:.80}, of type {type(ground_truth).__name__}"


def why_no_integer_text(ground_truth: object) -> str | None:
    """Likewise, of rules that compare numbers as text: a float such as 72.0 is no text that anybody answers."""
    if isinstance(ground_truth, float) and ground_truth.is_integer():
        return f"the float {ground_truth!r}, as where one value of a column of integers is missing. Write it as text or integer"
    return why_no_text(ground_truth)
