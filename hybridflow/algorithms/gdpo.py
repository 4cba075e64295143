"""GDPO: each of several rewards is normalised within its group before they are added, so that none drowns another.

    A = (a - mean) / std over the step's tokens,   a = sum over rewards k of w_k (r_k - mean of the group) / std of the group
    loss = mean over tokens of -min(ratio A, clip(ratio) A) [+ beta KL(policy || reference)]

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Liu et al. 2026, arXiv:2601.05242.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics
from hybridflow.registry import REWARDS, nearest

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of GDPO."""

    rewrites_rewards: ClassVar[bool] = True
    rewards: tuple[str, ...] = ()
    """Numbers that the reward function returns, each a reward (column `reward/NAME`); none means the reward itself."""
    reward_weights: tuple[float, ...] = ()
    """One for each; none means 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights: found {len(self.reward_weights)} for {len(self.rewards)} rewards; give as many")

    def errors(self, run: RunConfig) -> list[FieldError]:
        errors, key, known = super().errors(run), "algorithm.rewards", reward_names(run)
        if self.rewards and self.overlong_penalty:
            problem = f"is no part of the sum of {key}. Set it to 0, and have the reward function return such a punishment"
            errors.append(FieldError("algorithm.overlong_penalty", problem, related=(key,)))
        for name in self.rewards if known is not None else ():
            if not {name, name.partition("/")[0]} & set(known or ()):
                there = f"are {', '.join(known)}{nearest(name, known)}" if known else "is none without environment.add_reward"
                errors.append(FieldError(key, f"found {name!r}; there {there}", related=("reward.functions",)))
        return errors


def reward_names(run: RunConfig) -> list[str] | None:
    """What `algorithm.rewards` can name, `NAME/...` aside; None where only the reward functions know."""
    model = ["rules", "model"] if run.reward_model.path is not None else []
    labels = [term.label or (term.name if term.path is None and term.name in REWARDS else "") for term in run.reward.functions]
    is_scored = run.environment.add_reward or not run.environment.is_set
    if "reward" in run.placement.workers or (is_scored and not (labels and all(labels))):
        return None
    return [*labels, *model] if is_scored else model


class GDPO(PolicyAlgorithm):
    """Advantages and loss of GDPO."""

    config_class = Config
    config: Config

    def parts(self, batch: Batch) -> list[Any]:
        """Each reward of the rows; 0 where the row's reward failed."""
        return [np.nan_to_num(batch[f"reward/{name}"]) for name in self.config.rewards] or [batch["reward"]]

    def keep(self, group: Batch) -> bool:
        parts = np.stack(self.parts(group))  # equal sums of different parts are something to learn from
        return super().keep(group.with_columns(reward=(parts != parts[:, :1]).any(axis=0).astype(np.float32)))

    def learn(self, batch: Batch) -> Metrics:
        batch = self.with_log_probs(self.with_length_penalty(batch))
        parts = self.parts(batch)
        weights = self.config.reward_weights or [1.0] * len(parts)
        each = [weight * ops.group_normalized(part, batch["group"]) for weight, part in zip(weights, parts, strict=True)]
        batch = self.with_returns(batch.with_columns(reward=sum(each[1:], each[0]).numpy()), whiten=True)
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run), advantage="advantages")
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
