"""DAPO: GRPO with asymmetric clip, token mean, a soft punishment of overlong responses, and no prompts that teach nothing.

    A = (r - mean) / std of the group, r with the punishment;   loss = mean over tokens of -min(r_t A, clip(r_t) A)
    prompts whose responses all have the same reward are refused, and others take their place

    prompts --> rollout --> reward --> [actor: old log-probs] --> [reference] --> actor.update x updates

Yu et al. 2025, arXiv:2503.14476, eq. 8 to 13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import Clip, GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import COUNT, NOT_NEGATIVE
from hybridflow.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of DAPO."""

    clip: Clip = (0.2, 0.28)
    """The probability ratio is kept within [1 - low, 1 + high]."""
    responses_per_prompt: Annotated[int, COUNT] = 16
    """Responses generated to each prompt: the group whose mean is the baseline."""
    dynamic_sampling: bool = True
    """Refuse prompts whose responses all have the same reward."""
    overlong_penalty: Annotated[float, NOT_NEGATIVE] = 1.0
    """Taken from the reward of a response that is as long as may be; 0 for none."""


class DAPO(PolicyAlgorithm):
    """Advantages and loss of DAPO."""

    config_class = Config
    config: Config

    def learn(self, batch: Batch) -> Metrics:
        batch = self.prepare(batch)  # rewards less the punishment of long responses
        advantage = ops.group_normalized(batch["reward"], batch["group"])
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        metrics = Metrics.merged(call.result() for call in updates)
        if "length_penalty" in batch:
            metrics += Metrics({"dapo/overlong_penalty": float(batch["length_penalty"].mean())})
        return metrics
