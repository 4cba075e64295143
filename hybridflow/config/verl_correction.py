"""What verl's algorithm.rollout_correction means: weights between engine and trainer, and what is rejected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hybridflow.config.verl_values import UntranslatableError, choice, is_true

if TYPE_CHECKING:
    from hybridflow.config.verl_rules import Given, Values

CORRECTION = "algorithm.rollout_correction"
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"


def correction(given: Given) -> Values:
    """Importance weights between engine and trainer, what is rejected, and whether the engine's log-probabilities are the old
    ones, with which the ratio is the weight."""
    weights, is_weighing = given(f"{CORRECTION}.rollout_is"), True
    if is_true(given(f"{CORRECTION}.bypass_mode")):
        if (mode := given(LOSS_MODE)) != "vanilla":
            advice = f"Set bypass_mode to False, or {LOSS_MODE} to vanilla"
            raise UntranslatableError(f"in verl bypass_mode puts the clipped loss in place of {mode}. {advice}")
        yield "algorithm.old_log_probs", "rollout"
        known = choice("Set it to one of these", ppo_clip="clipped_ratio", reinforce="policy_gradient")
        is_plain = is_true(given(f"{CORRECTION}.use_policy_gradient"))
        surrogate = "policy_gradient" if is_plain else known(given(f"{CORRECTION}.loss_type"))
        yield "algorithm.surrogate", surrogate
        is_weighing = surrogate == "policy_gradient"
    if weights is not None and is_weighing:
        levels = choice("Set algorithm.importance_cap and importance_level", token="token", sequence="sequence")
        yield "algorithm.importance_level", levels(weights)
        low, high = _bounds(given(f"{CORRECTION}.rollout_is_threshold"))
        yield "algorithm.importance_cap", high if low is None else None
        yield "algorithm.importance_mask", None if low is None else [low, high]
        is_normalized = is_true(given(f"{CORRECTION}.rollout_is_batch_normalize"))
        if is_normalized and is_true(given(f"{CORRECTION}.bypass_mode")):
            advice = "Set rollout_is_batch_normalize to False, or bypass_mode"
            raise UntranslatableError(f"in verl bypass_mode divides by the mean of a microbatch; here it is a step's. {advice}")
        yield "algorithm.importance_normalized", is_normalized
    yield "algorithm.rejections", list(_rejections(given))


OF_EARLIER = {"token": "token_k1", "sequence": "sequence_sum_k1", "geometric": "sequence_mean_k1"}
"""Names of rejections in verl before 0.7, whose thresholds are of trainer over engine."""


def _rejections(given: Given) -> Iterator[dict[str, object]]:
    named, limits = given(f"{CORRECTION}.rollout_rs"), given(f"{CORRECTION}.rollout_rs_threshold")
    names = [name.strip() for name in str(named or "").split(",") if name.strip()]
    if limits is None and set(names) & set(OF_EARLIER):
        limits = given(f"{CORRECTION}.rollout_is_threshold")
    if names and limits is None:
        raise UntranslatableError(f"rollout_rs is {named}, without a bound. Set {CORRECTION}.rollout_rs_threshold")
    bounds = [part.strip() for part in str(limits).split(",")] if names else []
    for name, bound in zip(names, bounds * (len(names) if len(bounds) == 1 else 1), strict=False):
        low, high = _bounds(bound)
        lowest = low or given(f"{CORRECTION}.rollout_rs_threshold_lower") or 1.0 / high
        least, most = math.log(_bounds(lowest)[1]), math.log(high)
        if name in OF_EARLIER:
            yield {"statistic": OF_EARLIER[name], "least": -most, "most": -least}
        elif name.endswith("k1"):
            yield {"statistic": _statistic(name), "least": least, "most": most}
        elif low is not None:
            raise UntranslatableError(f"found {bound}, but {name} is a distance and has no lower bound. Set it to {high:g}")
        else:
            yield {"statistic": _statistic(name), "most": high}
    if len(bounds) not in (0, 1, len(names)):
        raise UntranslatableError(f"{len(bounds)} bounds for {len(names)} of rollout_rs. Set one for each, or one for all")
    if (veto := given(f"{CORRECTION}.rollout_token_veto_threshold")) is not None:
        yield {"statistic": "sequence_max_k1", "most": -math.log(_bounds(veto)[1])}


def _statistic(name: str) -> object:
    names = [f"token_k{kind}" for kind in (1, 2, 3)]
    names += [f"seq_{level}_k{kind}" for level in ("sum", "mean", "max") for kind in (1, 2, 3) if (level, kind) != ("max", 1)]
    known = {name: name.replace("seq", "sequence") for name in names} | OF_EARLIER
    return choice("Set algorithm.rejections", **known)(name)


def _bounds(value: object) -> tuple[float | None, float]:
    """A number, or both ends in one: 0.5_2.0, of which YAML makes a number."""
    low, _, high = str(value).rpartition("_")
    try:
        found = float(low) if low else None, float(high)
    except ValueError as error:
        raise UntranslatableError(f"found {value!r}; needed: a number, or two with _ between them") from error
    if min(found[1], found[0] or 1.0) <= 0:
        raise UntranslatableError(f"found {value!r}; needed: more than 0")
    return found
