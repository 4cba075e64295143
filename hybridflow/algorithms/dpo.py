"""DPO: a policy learns from pairs of responses, without a reward model and without sampling. IPO and KTO are other losses.

Rafailov et al. 2023, arXiv:2305.18290; `ops.PreferenceLoss` has the equations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.base import Algorithm, check_prompts_per_update
from hybridflow.batch import Batch
from hybridflow.config.ranges import BELOW_ONE, COUNT, POSITIVE
from hybridflow.errors import FieldError
from hybridflow.metrics import Metrics
from hybridflow.workers.token_functions import row_log_ratios

if TYPE_CHECKING:
    from hybridflow.config.schema import Config as RunConfig
    from hybridflow.workers.actor import ActorWorker
    from hybridflow.workers.reference import ReferenceWorker
    from hybridflow.workers.reward import RewardWorker
    from hybridflow.workers.rollout import RolloutWorker

RESPONSE_COLUMNS = ("response", "response_text", "response_tokens", "loss_mask", "loss_tokens")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DPO, IPO and KTO."""

    prompts_per_update: Annotated[int, COUNT] | None = None
    """Pairs of one update; divides data.prompts_per_step. Null means all."""
    loss: Literal["sigmoid", "ipo", "kto"] = "sigmoid"
    """sigmoid is DPO. kto takes chosen and rejected responses for desirable and undesirable ones, and computes
    log-probabilities a second time, of responses under other prompts."""
    beta: Annotated[float, POSITIVE] = 0.1
    """Of the implicit reward beta log(policy / reference): the larger, the nearer to the reference."""
    label_smoothing: Annotated[float, BELOW_ONE] = 0.0
    """Share of pairs that are taken to be labelled the wrong way round, below 0.5; for loss: sigmoid."""


class DPO(Algorithm):
    """Rollout and reward serve validation only, and are left out without validation files."""

    config_class = Config
    rows = "preferences"
    config: Config
    actor: ActorWorker
    reference: ReferenceWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        return prompts

    def learn(self, batch: Batch) -> Metrics:
        batch = batch.join(self.reference.log_probs(batch))
        calls = []
        for part in batch.split(2 * (self.config.prompts_per_update or self.run.data.prompts_per_step)):
            calls.append(self.actor.update.start(self.with_baseline(part), loss=self.loss()))
        return Metrics.merged(call.result() for call in calls)

    def measure(self, rows: Batch) -> Metrics:
        rows = rows.join(self.reference.log_probs(rows))
        return self.actor.measure(self.with_baseline(rows), loss=self.loss())

    def with_baseline(self, rows: Batch) -> Batch:
        """For KTO, how far the policy is from the reference: the mean log-ratio of responses to other prompts, at least 0.
        Ethayarajh et al. 2024, arXiv:2402.01306, sec. 4.1."""
        if self.config.loss != "kto":
            return rows
        shifted = rows.select(np.roll(np.arange(len(rows)), 2))
        responses = shifted.without([name for name in shifted.names if name not in RESPONSE_COLUMNS])
        mixed = rows.without(("reference_log_probs",)).join(responses)
        pending = [self.actor.log_probs.start(mixed), self.reference.log_probs.start(mixed)]
        ratios = self.actor.compute(mixed.join(*(call.result() for call in pending)), row_log_ratios)["log_ratio"]
        return rows.with_columns(kl_baseline=np.full(len(rows), max(0.0, float(ratios.mean())), np.float32))

    def loss(self) -> ops.PreferenceLoss:
        """Of all updates of the run."""
        config = self.config
        return ops.PreferenceLoss(kind=config.loss, beta=config.beta, label_smoothing=config.label_smoothing)

    @classmethod
    def unused_roles(cls, run: RunConfig) -> set[str]:
        return set() if run.data.validation_files else {"rollout", "reward", "reward_model"}

    @classmethod
    def check(cls, run: RunConfig) -> list[FieldError]:
        options = run.algorithm.options
        assert isinstance(options, Config)
        errors = check_prompts_per_update(run, options.prompts_per_update)
        if options.label_smoothing and (options.label_smoothing >= 0.5 or options.loss != "sigmoid"):
            problem = f"found {options.label_smoothing:g} with loss={options.loss}"
            errors.append(FieldError("algorithm.label_smoothing", f"{problem}; it is for loss=sigmoid, below 0.5"))
        return errors
