"""Two rollouts per step: a first answer, and a second one by a model that has seen it. Both are learned from.

Run it with `algorithm=examples.extend.second_thought:SecondThought` and `rollout.max_model_tokens` for prompt and two answers.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch, Ragged
from hybridflow.metrics import Metrics
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of the section `algorithm`."""

    responses_per_prompt: int = 4


def with_first_answer(batch: Batch, context: object) -> Batch:
    """Prompts that end with the first answer; computed where the tokens are."""
    joined = [np.concatenate(row) for row in zip(batch.tokens("prompt"), batch.tokens("response"), strict=True)]
    lengths = np.array([len(row) for row in joined])
    return Batch.from_columns({"prompt": Ragged.from_rows(joined, np.int32), "prompt_tokens": lengths})


class SecondThought(Algorithm):
    """Group-centred policy gradients over both answers, each with the reward of the second."""

    config_class: ClassVar[type] = Config
    config: Config
    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        first = self.respond(prompts.repeat(self.config.responses_per_prompt))
        longer = prompts.repeat(self.config.responses_per_prompt).join(self.reward.compute(first, with_first_answer))
        second = self.respond(longer)
        first = first.with_columns(reward=second["reward"])
        return Batch.concatenate([part.with_columns(turn=np.full(len(part), n)) for n, part in enumerate((first, second))])

    def learn(self, batch: Batch) -> Metrics:
        group = 2 * batch["group"] + batch["turn"]
        advantage = ops.group_normalized(batch["reward"], group).numpy()
        loss = ops.PolicyLoss(advantage="advantage", old_log_probs=self.old_log_probs())
        told = Metrics({"second_thought/reward": float(batch["reward"].mean())})
        return told + self.actor.update(batch.with_columns(advantage=advantage), loss=loss)
