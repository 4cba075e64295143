"""DAPO: GRPO with asymmetric clip, token mean, a soft punishment of overlong responses, and no prompts that teach nothing.

    A = (r - mean) / std of the group, r with the punishment;   loss = mean over tokens of -min(r_t A, clip(r_t) A)
    prompts whose responses all have the same reward are refused, and others take their place

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Yu et al. 2025, arXiv:2503.14476, eq. 8 to 13.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.algorithms.options import Clip, GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import AT_LEAST_TWO, COUNT, NOT_NEGATIVE
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.base import Worker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of DAPO."""

    clip: Clip = (0.2, 0.28)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    responses_per_prompt: Annotated[int, AT_LEAST_TWO] = 16
    """Responses generated to each prompt: the group whose mean is the baseline."""
    dynamic_sampling: bool = True
    """Refuse prompts whose responses all have the same reward."""
    max_rounds: Annotated[int, COUNT] = 10
    """Once so many times a step's prompts were drawn for it, no further prompt is refused."""
    overlong_buffer_tokens: Annotated[int, COUNT] | None = None
    """Over the last so many tokens before data.max_response_tokens the punishment rises to `overlong_penalty`; null means a
    fifth of them."""
    overlong_penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """Taken from the reward of a response that is as long as may be; 0 for none."""


class DAPO(Algorithm):
    """Roles, dataflow and loss of DAPO."""

    config_class = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reference: ReferenceWorker
    reward: RewardWorker

    def __init__(self, run: RunConfig, groups: Mapping[str, Worker]):
        super().__init__(run, groups)
        self.refused = (0, 0)
        """A step, and how many prompts were refused in it."""

    def collect(self, prompts: Batch) -> Batch:
        return self.respond(prompts.repeat(self.config.responses_per_prompt))

    def keep(self, group: Batch) -> bool:
        is_alike = self.config.dynamic_sampling and np.ptp(group["reward"]) == 0
        refused = self.refused if self.refused[0] == self.step else (self.step, 0)
        is_refused = is_alike and refused[1] < (self.config.max_rounds - 1) * self.run.data.prompts_per_step
        self.refused = (self.step, refused[1] + is_refused)
        return not is_refused

    def learn(self, batch: Batch) -> Metrics:
        limit = self.run.data.max_response_tokens
        tokens, buffer = batch["response_tokens"], self.config.overlong_buffer_tokens or max(1, limit // 5)
        penalty = ops.overlong_penalty(tokens, max_tokens=limit, buffer_tokens=buffer).numpy()
        metrics = Metrics({"dapo/overlong_penalty": float(self.config.overlong_penalty * penalty.mean())})
        batch = self.prepare(batch.with_columns(reward=batch["reward"] + self.config.overlong_penalty * penalty))
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return metrics + Metrics.merged(update.result() for update in updates)
