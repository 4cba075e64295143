"""DRO: plain policy gradients with a quadratic pull to the policy that sampled, in place of a ratio and its clip.

    loss = mean over tokens of -A log p + (beta / 2) (log p - log old)^2,   A as in GRPO
    old: the actor before the updates; the engine where older weights sample one update's rows, or as `old_log_probs` says

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Richemond et al. 2024, arXiv:2405.19107, sec. 3; with the advantages of a group for the value model, as in verl 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import POSITIVE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of DRO."""

    beta: Annotated[float, POSITIVE] = 1.0
    """Weight of the pull to the old policy, tau of the paper."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation."""

    def errors(self, run: RunConfig) -> list[FieldError]:
        errors = super().errors(run)
        is_chosen = self.old_log_probs == "actor" and isinstance(self.importance_cap, float)
        if is_chosen and self.ratio_over(run) == "rollout_log_probs":
            problem = "one update from older weights is pulled to the engine's probabilities, and not weighed. Set auto"
            errors.append(FieldError("algorithm.importance_cap", problem, related=("loop.max_staleness",)))
        return errors


class DRO(PolicyAlgorithm):
    """Advantages and loss of DRO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=self.config.scale_by_std)
        loss = self.config.policy_loss(self.run, partial(ops.quadratic, beta=self.config.beta))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
