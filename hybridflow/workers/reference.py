"""The reference: the policy as it was, which the KL keeps the actor close to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridflow.batch import Batch
from hybridflow.workers.base import RankContext
from hybridflow.workers.model_worker import ModelWorker
from hybridflow.workers.remote import remote

if TYPE_CHECKING:
    import torch

    from hybridflow.config.schema import Config
    from hybridflow.workers.microbatches import Microbatch


class ReferenceWorker(ModelWorker):
    """A share of a frozen policy, the reference or a teacher. It has no state beyond the folder that it is read from.

    It reads the section of the configuration that is called like its role, or else `reference`.
    """

    def __init__(self, config: Config, context: RankContext):
        from hybridflow.models.build import build_policy
        from hybridflow.workers.model_core import ModelCore, frozen
        from hybridflow.workers.model_spec import frozen_model

        super().__init__(config, context)
        settings = self.config.models.get(context.role, self.config.reference)
        self.model = build_policy(frozen_model(self.config, context, settings.path))
        self.core = frozen(ModelCore(self.model, settings, context, temperature=self.config.rollout.temperature or 1.0))

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch) -> Batch:
        """Column `ROLE_log_probs`, as `reference_log_probs`, in nats, at the temperature with which each row was sampled."""
        return Batch.from_columns(dict(self.core.evaluate(batch, self._forward)))

    def _forward(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        log_probs_R, _ = self.model(microbatch.packed, temperature=microbatch.temperature)
        return {f"{self.context.role}_log_probs": log_probs_R}
