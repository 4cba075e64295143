"""Clip-Cov: no gradient from a few tokens that take much entropy away, drawn from those of large covariance.

    loss = mean over tokens of -min(r_t A, clip(r_t) A), 0 at chosen tokens,   A as in GRPO
    chosen: a share, drawn from those with (log p - mean) (A - mean) within bounds, means over a microbatch

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Cui et al. 2025, arXiv:2505.22617, eq. 10 to 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import Clip, GroupOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import OPEN_SHARE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions):
    """Options of Clip-Cov."""

    clip: Clip = (0.2, 0.2)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    share: Annotated[float, OPEN_SHARE] = 2e-4
    """Share of the tokens that are chosen, of a microbatch; at least one is, where any is within the bounds."""
    bounds: tuple[float, float] = (1.0, 5.0)
    """Covariances between which tokens are drawn."""


class ClipCov(PolicyAlgorithm):
    """Advantages and loss of Clip-Cov."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        c, seed = self.config, int(np.random.default_rng([self.run.run.seed, self.step]).integers(2**31))
        chosen = partial(ops.clip_covariance, clip=c.clip, share=c.share, bounds=c.bounds, seed=seed)
        loss = c.policy_loss(self.run, chosen)
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return Metrics.merged(call.result() for call in updates)
