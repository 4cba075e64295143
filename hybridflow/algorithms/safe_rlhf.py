"""Safe RLHF: the reward is raised while the mean cost stays under a limit, weighed against each other by a Lagrange multiplier.

    A = (A_r - lambda A_c) / (1 + lambda),   A_r, A_c: reward and cost less the mean of the group's others
    ln lambda <- ln lambda + rate lambda J_c,   J_c = mean cost of the step - limit
    loss = mean over tokens of -min(r_t A, clip(r_t) A) + beta KL(policy || reference)

    prompts --> rollout --> reward --> [cost_model] --> [actor: old log-probs] --> [reference] --> actor.update x updates

Dai et al. 2023, arXiv:2310.12773, eq. 9 and 10 (the constraint), 28 to 31 (the updates). Their two critics are leave-one-out
baselines here. Costs come from the role `cost_model` where `cost_model.path` is set, else from the reward function's `cost`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hybridflow import ops
from hybridflow.algorithms.base import PolicyAlgorithm
from hybridflow.algorithms.options import GroupOptions, PolicyOptions
from hybridflow.batch import Batch
from hybridflow.config.ranges import NOT_NEGATIVE, POSITIVE
from hybridflow.metrics import Metrics

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.base import Worker
    from hybridflow.workers.reward_model import RewardModelWorker


@dataclass(frozen=True, kw_only=True)
class Config(GroupOptions, PolicyOptions):
    """Options of Safe RLHF."""

    cost_limit: float = 0.0
    """The mean cost of responses that is allowed; a cost above 0 says unsafe."""
    initial_multiplier: Annotated[float, POSITIVE] = 1.0
    """Lambda of the first step."""
    multiplier_rate: Annotated[float, NOT_NEGATIVE] = 0.04
    """How fast the logarithm of lambda follows costs that exceed the limit, or stay below it."""
    kl_in: Literal["reward", "loss", "none"] = "loss"
    """Where the KL to the reference counts: in the reward, in the loss, or nowhere (no reference is loaded)."""


class SafeRLHF(PolicyAlgorithm):
    """Roles, dataflow, loss and multiplier of Safe RLHF."""

    config_class = Config
    config: Config
    cost_model: RewardModelWorker

    def __init__(self, run: RunConfig, groups: Mapping[str, Worker]):
        super().__init__(run, groups)
        self.multiplier = self.config.initial_multiplier

    def learn(self, batch: Batch) -> Metrics:
        has_model = "cost_model" in self.groups
        cost = self.cost_model.score(batch)["cost_model_score"] if has_model else batch["reward/cost"]
        batch, weight = self.prepare(batch), self.multiplier
        of_reward, of_cost = (ops.leave_one_out(column, batch["group"]) for column in (batch["reward"], cost))
        advantage = (of_reward - weight * of_cost) / (1 + weight)
        excess = float(cost.mean()) - self.config.cost_limit
        self.multiplier = weight * math.exp(min(self.config.multiplier_rate * weight * excess, 1.0))
        told = Metrics({"safe_rlhf/cost": float(cost.mean()), "safe_rlhf/multiplier": weight})
        loss = self.config.policy_loss(self.run, self.config.clipped(self.run))
        batch = batch.with_columns(advantage=advantage.numpy())
        updates = [self.actor.update.start(part, loss=loss) for part in self.updates(batch)]
        return told + Metrics.merged(call.result() for call in updates)

    def state_dict(self) -> dict[str, float]:
        return {"multiplier": self.multiplier}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.multiplier = state["multiplier"]

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        return super().unused_roles(run) | (set() if run.cost_model.path else {"cost_model"})
