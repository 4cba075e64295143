"""Rows that no answer can earn a reward for: found in the dataset, before anything is generated for them.

Only the rules of this package are asked: what a function of the user's does with a ground truth is its own affair. A rule says
what it cannot match by a function `why_unmatchable(ground_truth, data_source)` beside it, and which sources it is not for by
`why_unscored(data_source)`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatchcase
from functools import cache
from typing import cast

from hybridflow.config.schema import Config, RewardConfig, RewardTerm
from hybridflow.errors import DataError
from hybridflow.registry import REWARDS

Why = Callable[[object, str], str | None]
Unscored = Callable[[str], str | None]


def check_ground_truths(config: RewardConfig, rows: Iterable[tuple[int, object, str]], *, key: str) -> None:
    """`rows` are the number, ground truth and data source of each row of the files that `key` names.

    Raises:
        DataError: no answer can match the ground truth of a row; the first one is named, and how many there are. Or nothing
            scores the data source of one.
    """
    checks = [(term, why) for term in config.terms if term.path is None and (why := why_of(term.name))]
    unscored, problems = cache(lambda source: why_unscored(config, source)), []
    for number, ground_truth, source in rows:
        if unscored(source):
            raise DataError(f"{key}: row {number}: {unscored(source)}")
        for term, why in checks:
            if is_for(term, source) and (problem := why(ground_truth, source)):
                problems.append(f"row {number} (data_source {source!r}): column 'reward_model.ground_truth' is {problem}")
    if problems:
        more = f" So it is in {len(problems) - 1} other rows." if len(problems) > 1 else ""
        raise DataError(f"{key}: {problems[0]}.{more} No answer can match that: correct the file, or set another reward.name")


def is_scored_by_rules(config: Config, roles: Collection[str]) -> bool:
    """Whether responses go to the reward role that comes with the package."""
    is_asked = config.environment.add_reward or not config.environment.is_set
    return bool(is_asked) and "reward" in roles and "reward" not in config.placement.workers


def is_for(term: RewardTerm, data_source: str) -> bool:
    """Whether the function scores rows of this data source."""
    return not term.data_sources or any(fnmatchcase(data_source, pattern) for pattern in term.data_sources)


def why_unscored(config: RewardConfig, source: str) -> str | None:
    """Why rows of a data source get no reward: no function is for it, or one that goes by sources does not know it."""
    terms = [term for term in config.terms if is_for(term, source)]
    if not terms:
        return (
            f"no function of reward.functions scores data_source {source!r}. Give it one whose "
            "data_sources names it, or leave data_sources out of one that is for all"
        )
    asked = [_of_module(term.name, "why_unscored") for term in terms if term.path is None]
    return next((problem for why in asked if why is not None and (problem := cast("Unscored", why)(source))), None)


def why_of(name: str) -> Why | None:
    """What the module of a built-in rule says of ground truths; None where it says nothing."""
    return cast("Why | None", _of_module(name, "why_unmatchable"))


def _of_module(name: str, function: str) -> object:
    """A function of the module of a built-in rule; None where there is none."""
    return vars(importlib.import_module(REWARDS[name].partition(":")[0])).get(function) if name in REWARDS else None


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
