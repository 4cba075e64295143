"""How values of verl's change on the way to ours. A function takes verl's value, and may ask what was given so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Literal

from hybridflow.config.build import UnfitError, convert
from hybridflow.config.pools import parse_pool
from hybridflow.config.ranges import COUNT
from hybridflow.errors import HybridflowError, PlacementError

Given = Callable[[str], object]
"""Answers what a key, verl's or ours, was set to so far; None where it was not."""
Apply = Callable[[object, Given], Mapping[str, object]]
"""From the value of verl's key to values of ours."""
Convert = Callable[[object], object]


class UntranslatableError(HybridflowError):
    """A key or value of verl's that means nothing here; the message says what to do."""


def count_or_zero(value: object) -> object:
    """verl writes -1 for never, or for all; here that is 0."""
    return 0 if value == -1 else value


def sampling(value: object, given: Given) -> Mapping[str, object]:
    """`do_sample: False` is temperature 0."""
    return {} if _is_true(value) else {"validation.temperature": 0.0}


def choice(**names: object) -> Convert:
    """Names of verl's with the names here; None for those without one."""

    def convert(value: object) -> object:
        if names.get(str(value)) is None:
            allowed = ", ".join(name for name, ours in names.items() if ours is not None)
            raise UntranslatableError(f"verl's {value!r} has no equivalent here; allowed: {allowed}")
        return names[str(value)]

    return convert


def overlong_prompts(value: object, given: Given) -> Mapping[str, object]:
    """Filtering wins over truncation, in whatever order the two are given; without filtering verl stops with an error."""
    if _is_true(value):
        return {"data.overlong_prompts": "drop"}
    is_dropped = given("data.overlong_prompts") in (None, "drop")
    return {"data.overlong_prompts": "error"} if is_dropped else {}


def truncation(value: object, given: Given) -> Mapping[str, object]:
    """What happens to overlong prompts that are not filtered out."""
    ours = choice(error="error", left="truncate_left", right=None, middle=None)(value)
    return {} if given("data.overlong_prompts") == "drop" else {"data.overlong_prompts": ours}


def pool_size(part: Literal["nodes", "ranks_per_node"]) -> Apply:
    """One of the two numbers of pool `main`, the other as it was."""

    def apply(value: object, given: Given) -> Mapping[str, object]:
        text = str(given("placement.pools.main") or "1x1")
        try:
            size = parse_pool(text)
        except PlacementError as error:
            raise UntranslatableError(f"placement.pools.main is {text!r}: {error}") from error
        changed = replace(size, nodes=_count(value)) if part == "nodes" else replace(size, ranks_per_node=_count(value))
        return {"placement.pools.main": str(changed)}

    return apply


def clip(side: Literal[0, 1]) -> Apply:
    """The lower or the upper side of the clip, the other as it was."""

    def apply(value: object, given: Given) -> Mapping[str, object]:
        found = given("algorithm.clip")
        sides = list(found) if isinstance(found, list) and len(found) == 2 else [0.2, 0.2]
        sides[side] = value
        return {"algorithm.clip": sides}

    return apply


def kl_in_reward(value: object, given: Given) -> Mapping[str, object]:
    """`algorithm.kl_in: reward`; where switched off, the KL in the loss stays if it was asked for."""
    if given("algorithm.name") == "grpo":
        if _is_true(value):
            raise UntranslatableError("GRPO has its KL in the loss: use algorithm.kl_coefficient, or algorithm=ppo")
        return {}
    if _is_true(value):
        _refuse_two_kls(given("actor_rollout_ref.actor.use_kl_loss"))
        return {"algorithm.kl_in": "reward"}
    return {} if given("algorithm.kl_in") == "loss" else {"algorithm.kl_in": "none"}


def kl_in_loss(value: object, given: Given) -> Mapping[str, object]:
    """`algorithm.kl_in: loss` for PPO; GRPO's KL is there always, so False sets its coefficient to 0."""
    if given("algorithm.name") == "grpo":
        return {} if _is_true(value) else {"algorithm.kl_coefficient": 0.0}
    if _is_true(value):
        _refuse_two_kls(given("algorithm.use_kl_in_reward"))
        return {"algorithm.kl_in": "loss", "algorithm.kl_estimator": _estimator_in_loss(given)}
    return {"algorithm.kl_in": "none"} if given("algorithm.kl_in") == "loss" else {}


def kl_loss_coefficient(value: object, given: Given) -> Mapping[str, object]:
    """Counts in verl only where `use_kl_loss` is not switched off."""
    return {} if given("actor_rollout_ref.actor.use_kl_loss") is False else {"algorithm.kl_coefficient": value}


def kl_penalty(value: object, given: Given) -> Mapping[str, object]:
    """verl's estimator for the KL in the reward; the one in the loss has its own key."""
    estimator = KL_ESTIMATOR(value)
    return {} if given("algorithm.kl_in") == "loss" else {"algorithm.kl_estimator": estimator}


def kl_loss_type(value: object, given: Given) -> Mapping[str, object]:
    """Counts where the KL is in the loss. GRPO's estimator is k3, verl's low_var_kl."""
    estimator = KL_ESTIMATOR(value)
    if given("algorithm.name") != "grpo":
        return {"algorithm.kl_estimator": estimator} if given("algorithm.kl_in") == "loss" else {}
    if estimator != "k3":
        raise UntranslatableError(f"found {value!r}; GRPO estimates its KL with k3 (low_var_kl)")
    return {}


def _estimator_in_loss(given: Given) -> object:
    """By verl's key, else by ours, else k3, which is verl's default there."""
    if (kind := given("actor_rollout_ref.actor.kl_loss_type")) is not None:
        return KL_ESTIMATOR(kind)
    return (given("algorithm.kl_estimator") if given("algorithm.kl_penalty") is None else None) or "k3"


def critic_warmup(value: object, given: Given) -> Mapping[str, object]:
    """0 is the default, and an algorithm without critic accepts it."""
    is_default = value == 0 and given("algorithm.critic_warmup_steps") is None
    return {} if is_default else {"algorithm.critic_warmup_steps": value}


def rows_to_tokens(target: str) -> Apply:
    """A microbatch counted in rows, as tokens: each row as long as prompt and response can be."""

    def apply(value: object, given: Given) -> Mapping[str, object]:
        if value is None:
            return {}
        lengths = [_count(given(key) or 512) for key in ("data.max_prompt_tokens", "data.max_response_tokens")]
        return {target: _count(value) * sum(lengths)}

    return apply


def unless_given(target: str) -> Apply:
    """For a second key of verl's where there is one here: the first one given counts."""
    return lambda value, given: {} if given(target) is not None else {target: value}


def shared(target: str) -> Apply:
    """For keys of several roles of verl's that are one key here: they must agree."""

    def apply(value: object, given: Given) -> Mapping[str, object]:
        if given(target) not in (None, value):
            raise UntranslatableError(f"found {value!r}, but {target} is {given(target)!r}, one for all models")
        return {target: value}

    return apply


def cache_is_freed(value: object, given: Given) -> Mapping[str, object]:
    """Freed where sizes require it, or never."""
    return {"rollout.sleep": "auto" if _is_true(value) else False}


def run_name(value: object, given: Given) -> Mapping[str, object]:
    """Names the run, and its folder too, so that runs of different names do not resume from one another."""
    own_folder = given("run.folder") not in (None, f"outputs/{given('trackers.run_name')}")
    return {"trackers.run_name": value} | ({} if own_folder else {"run.folder": f"outputs/{value}"})


def resume_mode(value: object, given: Given) -> Mapping[str, object]:
    """`resume_path` takes the path from its own key."""
    if value == "resume_path":
        path = given("trainer.resume_from_path")
        return {"checkpoint.resume": path} if path else {}
    return {"checkpoint.resume": choice(auto="auto", disable="never", resume_path="")(value)}


def resume_path(value: object, given: Given) -> Mapping[str, object]:
    """Counts in verl only where `resume_mode` says so."""
    return {"checkpoint.resume": value} if value and given("trainer.resume_mode") == "resume_path" else {}


KL_ESTIMATOR = choice(kl="k1", k1="k1", mse="k2", k2="k2", low_var_kl="k3", k3="k3", abs=None)


def _refuse_two_kls(is_other_on: object) -> None:
    if is_other_on is True:
        raise UntranslatableError("use_kl_in_reward and use_kl_loss are both True, but the KL counts once. Set one to False")


def _is_true(value: object) -> bool:
    return bool(_as(bool, value))


def _count(value: object) -> int:
    return int(str(_as(Annotated[int, COUNT], value)))


def _as(hint: object, value: object) -> object:
    """`value`, which must be what a key of ours of this type takes."""
    try:
        return convert(value, hint)
    except UnfitError as error:
        raise UntranslatableError(str(error)) from error
