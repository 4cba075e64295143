"""The reference: the policy as it was, which the KL keeps the actor close to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridflow.batch import Batch
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.layouts import training_layout
from hybridflow.workers.remote import remote

if TYPE_CHECKING:
    import torch

    from hybridflow.config.schema import Config
    from hybridflow.parallel.layout import Layout
    from hybridflow.workers.microbatches import Microbatch


class ReferenceWorker(Worker):
    """A share of the frozen policy. It has no state beyond the folder that it is read from."""

    def __init__(self, config: Config, context: RankContext):
        from hybridflow.models.build import build_policy
        from hybridflow.workers.frozen import FrozenCore
        from hybridflow.workers.model_spec import frozen_model

        super().__init__(config, context)
        self.model = build_policy(frozen_model(self.config, context, config.reference.path))
        self.core = FrozenCore(self.model, self.config.reference, context, temperature=self.config.rollout.temperature or 1.0)

    @classmethod
    def layout_of(cls, config: Config, num_ranks: int) -> Layout:
        return training_layout(config, num_ranks)

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch) -> Batch:
        """Column `reference_log_probs`, in nats, at the temperature with which each row was sampled."""
        return Batch.from_columns(dict(self.core.evaluate(batch, self._forward)))

    def _forward(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        log_probs_R, _ = self.model(microbatch.packed, temperature=microbatch.temperature)
        return {"reference_log_probs": log_probs_R}
