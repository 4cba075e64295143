"""In which way a reward function can be called, and whether `reward.options` fit, from its parameters alone.

The loaded function is asked (rewards/call.py), and before anything starts its source, which is not executed (rules_reward.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hybridflow.registry import nearest

Parameters = Mapping[str, inspect.Parameter]
FOUR_ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
SIGNATURES = (
    "(reward_input, **kwargs), (data_source, solution_str, ground_truth, extra_info=None, **kwargs) or, as in TRL, "
    "(completions, **kwargs)"
)


class SignatureError(ValueError):
    """The function cannot be called; `option` is the one of `reward.options` to blame, if any."""

    def __init__(self, problem: str, *, option: str | None = None):
        super().__init__(problem)
        self.option = option


@dataclass(frozen=True)
class CallStyle:
    """How a function is called, its options aside."""

    style: Literal["one", "by_name", "by_place", "columns"]
    """With one dict or list of them; with some of the four arguments, by their names or in their order; or with columns of many
    responses by their names, as TRL does."""
    arguments: tuple[str, ...] = ()
    """Those of `FOUR_ARGUMENTS` that it is given; of columns, those that it needs."""
    allowed: tuple[str, ...] = ()
    """Columns that it takes by name."""
    takes_any: bool = False
    """Whether it takes columns of other names too."""


def call_for(parameters: Parameters, options: Mapping[str, object], *, is_batch: bool) -> CallStyle:
    """The way that the signature asks for.

    Raises:
        SignatureError: it is none that is known, or `options` do not fit.
    """
    takes_any = _takes_any(parameters)
    if "completions" in parameters and "solution_str" not in parameters:
        return _call_with_columns(parameters, options)
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    places = [p for p in parameters.values() if p.kind in positional and p.name not in options]
    num_required = sum(p.default is p.empty for p in places)
    by_name = {"solution_str", "ground_truth"} <= set(parameters)
    if not by_name and (num_required == 2 or not places):
        raise SignatureError(f"takes ({', '.join(parameters)}); expected {SIGNATURES}")
    if not by_name and num_required < 3:
        _check_rest(parameters, {places[0].name}, options)
        return CallStyle("one")
    if is_batch:
        raise SignatureError("a batch function takes one list of dicts, (reward_inputs, **kwargs)")
    if by_name:
        names = tuple(name for name in FOUR_ARGUMENTS if takes_any or name in parameters)
        _check_rest(parameters, set(names), options)
        return CallStyle("by_name", names)
    taken = FOUR_ARGUMENTS[: len(places)]
    _check_rest(parameters, {p.name for p in places[: len(taken)]}, options)
    return CallStyle("by_place", taken)


def _call_with_columns(parameters: Parameters, options: Mapping[str, object]) -> CallStyle:
    """TRL's way: everything by name. Which columns the dataset has shows when the function is called."""
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters.values() if p.kind in by_keyword]
    supplied = {p.name for p in named if p.name not in options}
    _check_rest(parameters, supplied, options)
    return CallStyle(
        "columns",
        tuple(p.name for p in named if p.default is p.empty),
        allowed=tuple(p.name for p in named),
        takes_any=_takes_any(parameters),
    )


def _check_rest(parameters: Parameters, supplied: set[str], options: Mapping[str, object]) -> None:
    """Options supply all parameters that are left and have no default, and nothing that the function does not take."""
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in parameters.values() if p.kind in by_keyword and p.name not in supplied]
    names = [p.name for p in named]
    for option in options:
        if option in supplied:
            raise SignatureError(f"{option!r} is given by hybridflow; leave reward.options.{option} out", option=option)
        if option not in names and not _takes_any(parameters):
            takes = f"it takes {', '.join(names) or 'no options'}"
            problem = f"the function does not take reward.options.{option}; {takes}{nearest(option, names)}"
            raise SignatureError(problem, option=option)
    for parameter in named:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise SignatureError(f"the function needs {parameter.name!r}; set reward.options.{parameter.name}")


def _takes_any(parameters: Parameters) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
