"""Algorithms by their definitions, in Python floats: from the rows of a step to the loss of its update.

`new` are the policy's log-probabilities; `frozen` the same numbers where a definition takes no gradient through them, so that a
difference quotient in `new` alone is the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.reference import advantages as reference
from tests.reference.losses import aggregate, kl, policy_token

Rows = list[list[float]]


@dataclass(frozen=True)
class Case:
    """The rows of a step: numbers of rows, and one list of numbers per row for its tokens."""

    reward: list[float]
    greedy_reward: list[float]
    cost: list[float]
    group: list[int]
    num_tokens: list[int]
    """Of the responses, those that the policy did not sample included."""
    old: Rows
    reference: Rows
    values: Rows
    max_tokens: int
    options: Mapping[str, Any]
    """Those of Clip-Cov, KL-Cov, and of GDPO the `rewards` with `reward_weights`."""
    parts: Mapping[str, list[float]]
    """Numbers of the reward function by their names."""

    @property
    def lengths(self) -> list[int]:
        """Sampled tokens of each row."""
        return [len(row) for row in self.old]


def constant(numbers: Sequence[float], lengths: Sequence[int]) -> Rows:
    """Each row's number at each of its tokens."""
    return [[number] * length for number, length in zip(numbers, lengths, strict=True)]


def whitened(rows: Rows) -> Rows:
    """All tokens shifted and scaled together."""
    flat = iter(reference.whiten([number for row in rows for number in row]))
    return [[next(flat) for _ in row] for row in rows]


def token_rewards(case: Case, rewards: Sequence[float], coefficient: float, estimator: str) -> Rows:
    """The reward at the last token, less the KL of each token."""
    rows = []
    for reward, old, other in zip(rewards, case.old, case.reference, strict=True):
        row = [-coefficient * kl(p, q, estimator) for p, q in zip(old, other, strict=True)]
        rows.append([*row[:-1], row[-1] + reward] if row else row)
    return rows


def less_kl(case: Case, coefficient: float, estimator: str) -> list[float]:
    """Rewards of rows less the KL of all their tokens."""
    return [math.fsum(row) for row in token_rewards(case, [0.0] * len(case.reward), coefficient, estimator)]


def members(case: Case, row: int) -> list[int]:
    """The rows of the same group."""
    return [other for other, group in enumerate(case.group) if group == case.group[row]]


def weighted_by_length(case: Case, reward: Sequence[float]) -> list[float]:
    """Less the sum of lengths times rewards over the sum of lengths, where there are others."""
    found = []
    for row in range(len(reward)):
        group = members(case, row)
        total = sum(case.lengths[other] for other in group)
        baseline = sum(case.lengths[other] * reward[other] for other in group) / total if len(group) > 1 and total else 0.0
        found.append(reward[row] - baseline)
    return found


def best_alone(case: Case, reward: Sequence[float]) -> list[float]:
    """Of a group's best row by how much it beats the second, in standard deviations; 0 for others."""
    found = []
    for row in range(len(reward)):
        others = [reward[other] for other in members(case, row) if other != row]
        mean = math.fsum([reward[row], *others]) / (1 + len(others))
        squares = math.fsum((value - mean) ** 2 for value in [reward[row], *others])
        is_best = bool(others) and reward[row] > max(others)
        found.append((reward[row] - max(others)) / math.sqrt(squares / len(others)) if is_best else 0.0)
    return found


def advantages(name: str, case: Case) -> Rows:
    """The advantage of each token, with the defaults of each algorithm."""
    reward, lengths, group = case.reward, case.lengths, case.group
    match name:
        case "ppo":
            rewards = token_rewards(case, reward, 0.001, "k1")
            return whitened(reference.gae(rewards, case.values, 1.0, 1.0))
        case "reinforce_plus_plus":
            rewards = token_rewards(case, reward, 0.01, "k1")
            return whitened([reference.discounted_returns(row, 1.0) for row in rewards])
        case "gdpo":
            parts = [case.parts[name] for name in case.options.get("rewards", ())] or [reward]
            weights = case.options.get("reward_weights", [1.0] * len(parts))
            each = [reference.group_normalized(part, group, scale_by_std=True) for part in parts]
            summed = [math.fsum(w * a for w, a in zip(weights, row, strict=True)) for row in zip(*each, strict=True)]
            return whitened(constant(summed, lengths))
        case "reinforce_plus_plus_baseline":
            return whitened(constant(reference.group_normalized(reward, group, scale_by_std=False), lengths))
        case "remax":
            better = [r - greedy for r, greedy in zip(reward, case.greedy_reward, strict=True)]
            return [reference.discounted_returns(row, 1.0) for row in token_rewards(case, better, 0.01, "k1")]
        case "rloo":
            kls = less_kl(case, 0.03, "k1")
            penalised = [r + penalty for r, penalty in zip(reward, kls, strict=True)]
            return constant(reference.leave_one_out(penalised, group), lengths)
        case "opo":
            return constant(weighted_by_length(case, reward), lengths)
        case "gpg":
            varied = sum(len({reward[other] for other in members(case, row)}) > 1 for row in range(len(reward)))
            centred = reference.group_normalized(reward, group, scale_by_std=False)
            return constant([value * len(reward) / max(varied, 1) for value in centred], lengths)
        case "grpo_pass_at_k":
            return constant(best_alone(case, reward), lengths)
        case "distillation":
            return [[p - q for p, q in zip(*rows, strict=True)] for rows in zip(case.reference, case.old, strict=True)]
        case "safe_rlhf":
            of_reward, of_cost = reference.leave_one_out(reward, group), reference.leave_one_out(case.cost, group)
            return constant([(r - 1.0 * c) / (1 + 1.0) for r, c in zip(of_reward, of_cost, strict=True)], lengths)
        case "dr_grpo":
            return constant(reference.group_normalized(reward, group, scale_by_std=False), lengths)
        case "dapo":
            free = case.max_tokens - max(1, case.max_tokens // 5)
            shaped = [
                r - min(1.0, max(0.0, (tokens - free) / (case.max_tokens - free)))
                for r, tokens in zip(reward, case.num_tokens, strict=True)
            ]
            return constant(reference.group_normalized(shaped, group, scale_by_std=True), lengths)
        case _:
            return constant(reference.group_normalized(reward, group, scale_by_std=True), lengths)


def bounded(value: float, low: float, high: float) -> float:
    """`value` within the bounds."""
    return min(max(value, low), high)


def geometric_row(new: Sequence[float], old: Sequence[float], advantage: float, clip: float) -> float:
    """GMPO's loss of a row: log ratios are cut where that lowers the objective."""
    logs = [p - q for p, q in zip(new, old, strict=True)]
    kept = [min(x, clip) if advantage > 0 else max(x, -clip) for x in logs]
    return -advantage * math.exp(math.fsum(kept) / len(kept)) if advantage else 0.0


def row_losses(name: str, new: Rows, frozen: Rows, case: Case, advantage: Rows) -> Rows:
    """The surrogate of each token."""
    found = []
    for p, p0, q, a in zip(new, frozen, case.old, advantage, strict=True):
        ratio = [math.exp(x - y) for x, y in zip(p, q, strict=True)]
        ratio0 = [math.exp(x - y) for x, y in zip(p0, q, strict=True)]
        match name:
            case "gspo":
                mean = math.exp(math.fsum(x - y for x, y in zip(p0, q, strict=True)) / max(len(p), 1))
                tokens = [mean * math.exp(x - y) for x, y in zip(p, p0, strict=True)]
                row = [policy_token(s, A, (3e-4, 4e-4)) for s, A in zip(tokens, a, strict=True)]
            case "cispo":
                row = [-bounded(r, 0.0, 1.28) * A * x for r, A, x in zip(ratio0, a, p, strict=True)]
            case "dppo":
                bounds, moves = case.options.get("clip", (0.2, 0.2)), zip(map(math.exp, p0), map(math.exp, q), a, strict=True)
                left = [(x - y if A > 0 else y - x) > bounds[A > 0] for x, y, A in moves]
                weights = [0.0 if out else min(r, 20.0) for out, r in zip(left, ratio0, strict=True)]
                row = [-w * A * x for w, A, x in zip(weights, a, p, strict=True)]
            case "gmpo":
                row = [geometric_row(p, q, a[0], 0.4)] * len(p) if p else []
            case "sapo":
                taus = [1.0 if A > 0 else 1.05 for A in a]
                gates = [4 / tau / (1 + math.exp(-tau * (r - 1))) for tau, r in zip(taus, ratio, strict=True)]
                row = [-gate * A for gate, A in zip(gates, a, strict=True)]
            case "gpg":
                row = [-A * x for A, x in zip(a, p, strict=True)]
            case "dro":
                row = [0.5 * (x - o) ** 2 - A * x for A, x, o in zip(a, p, q, strict=True)]
            case "kl_cov":
                row = [-r * A for r, A in zip(ratio, a, strict=True)]
            case "dapo":
                row = [policy_token(r, A, (0.2, 0.28)) for r, A in zip(ratio, a, strict=True)]
            case _:
                row = [policy_token(r, A, (0.2, 0.2)) for r, A in zip(ratio, a, strict=True)]
        found.append(row)
    return found


def covariances(frozen: Rows, advantage: Rows) -> Rows:
    """(log p - mean) (A - mean) of each token."""
    p, a = ([number for row in rows for number in row] for rows in (frozen, advantage))
    mean_p, mean_a = math.fsum(p) / len(p), math.fsum(a) / len(a)
    return [[(x - mean_p) * (A - mean_a) for x, A in zip(*rows, strict=True)] for rows in zip(frozen, advantage, strict=True)]


def with_covariance(name: str, losses: Rows, new: Rows, frozen: Rows, case: Case, advantage: Rows) -> Rows:
    """KL-Cov adds a KL at the tokens of largest covariance; Clip-Cov drops all within its bounds that no clip holds."""
    found, flat = covariances(frozen, advantage), []
    for number, row in enumerate(found):
        flat += [(value, number, token) for token, value in enumerate(row)]
    if name == "kl_cov":
        for _, row, token in sorted(flat, reverse=True)[: max(1, int(len(flat) * case.options["share"]))]:
            losses[row][token] += abs(new[row][token] - case.old[row][token])
    if name == "clip_cov":
        low, high = case.options["bounds"]
        for value, row, token in flat:
            ratio, a = math.exp(frozen[row][token] - case.old[row][token]), advantage[row][token]
            is_held = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
            if low < value < high and not is_held:
                losses[row][token] = 0.0
    return losses


AGGREGATIONS = {
    **dict.fromkeys(("rloo", "remax"), "sequence_mean_of_sums"),
    **dict.fromkeys(("grpo", "gspo", "gmpo", "sapo"), "sequence_mean"),
    "dr_grpo": "sequence_sum",
}
KL_IN_LOSS = {"grpo": "k3", "safe_rlhf": "k3", "reinforce_plus_plus_baseline": "k2"}


def loss(name: str, new: Rows, frozen: Rows, case: Case) -> float:
    """The loss of an update on all rows."""
    advantage = advantages(name, case)
    losses = row_losses(name, new, frozen, case, advantage)
    losses = with_covariance(name, losses, new, frozen, case, advantage)
    if name in KL_IN_LOSS:
        for row, p, q in zip(losses, new, case.reference, strict=True):
            row[:] = [value + 0.001 * kl(x, y, KL_IN_LOSS[name]) for value, x, y in zip(row, p, q, strict=True)]
    return aggregate([row for row in losses if row], AGGREGATIONS.get(name, "token_mean"), case.max_tokens)
