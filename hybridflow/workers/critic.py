"""The critic: a language model's backbone that learns to predict returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridflow.batch import Batch
from hybridflow.workers.base import RankContext
from hybridflow.workers.model_worker import ModelWorker
from hybridflow.workers.remote import remote

if TYPE_CHECKING:
    import torch

    from hybridflow.config.schema import Config
    from hybridflow.metrics import Metrics
    from hybridflow.ops import Loss
    from hybridflow.workers.microbatches import Microbatch


class CriticWorker(ModelWorker):
    """A share of the value model, with its optimizer."""

    def __init__(self, config: Config, context: RankContext):
        from hybridflow.models.build import build_value_model
        from hybridflow.workers.model_spec import trained_model
        from hybridflow.workers.training import TrainingCore

        super().__init__(config, context)
        self.model = build_value_model(trained_model(self.config, context, config.critic.path))
        skips = config.run.max_skipped_updates
        self.core = self.trained = TrainingCore(self.model, self.config.critic, context, max_skipped_updates=skips)

    @remote("split_by_data_rank")
    def values(self, batch: Batch) -> Batch:
        """Column `values`: the expected return before each response token."""
        return Batch.from_columns({"values": self.core.evaluate(batch, self._forward)["values"]})

    @remote("split_by_data_rank")
    def update(self, batch: Batch, *, loss: Loss) -> Metrics:
        """One optimizer step on exactly these rows. Metrics are named `critic/...`.

        Raises:
            BatchError: the loss reads a column that the batch lacks.
        """
        return self.core.update(batch, loss, self._forward)

    def _forward(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        return {"values": self.model(microbatch.packed)}
