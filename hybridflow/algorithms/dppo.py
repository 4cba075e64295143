"""DPPO: a trust region in probabilities. Tokens that have left it count nothing; the others keep their whole gradient.

    loss = mean over tokens of -sg(min(r_t, cap)) A log p,   A as in GRPO,   without tokens that moved in the direction of A
    by more than a bound in total variation, |p - q|, or in the KL of "this token or any other"

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Qi et al. 2026, arXiv:2602.04879; the cap, sec. 5.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import Clip, GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import ABOVE_ONE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of DPPO."""

    divergence: Literal["tv", "kl"] = "tv"
    """What the bounds are of: total variation, or Kullback-Leibler."""
    clip: Clip = (0.2, 0.2)
    """The bounds, where the advantage is below 0 and above; of a KL about 0.05."""
    ratio_cap: Annotated[float, ABOVE_ONE] = 20.0
    """Larger ratios weigh this; where the engine's log-probabilities are the old ones, importance_cap if that is smaller."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation."""


class DPPO(PolicyAlgorithm):
    """Advantages and loss of DPPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        own = self.config
        advantage = ops.group_normalized(batch["reward"], batch["group"], scale_by_std=own.scale_by_std)
        cap = min(own.ratio_cap, own.ratio_bound(self.run) or own.ratio_cap)
        region = partial(ops.within_divergence, divergence=own.divergence, bounds=own.clip, cap=cap)
        loss = own.policy_loss(self.run, region)
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
