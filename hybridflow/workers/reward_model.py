"""Models that give a whole response one number: the reward model, trained on preferences or in use, and others like it."""

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


class RewardModelWorker(ModelWorker):
    """A share of a model whose head reads a number at the last token of a row.

    It reads the section of the configuration that is called like its role, and has an optimizer where the algorithm names the
    role in `trained_roles`. A role of your own (`placement.workers.safety=hybridflow.workers.reward_model:RewardModelWorker`)
    reads `reward_model`.
    """

    def __init__(self, config: Config, context: RankContext):
        from hybridflow.models.build import build_value_model
        from hybridflow.workers.model_core import ModelCore, frozen
        from hybridflow.workers.model_spec import frozen_model, trained_model
        from hybridflow.workers.training import TrainingCore

        super().__init__(config, context)
        is_trained = context.role in config.algorithm.trained_roles
        settings = self.config.models.get(context.role, self.config.reward_model)
        spec_of = trained_model if is_trained else frozen_model
        self.model = build_value_model(spec_of(self.config, context, settings.path))
        if is_trained:
            skips = config.run.max_skipped_updates
            self.trained = TrainingCore(
                self.model, self.config.reward_model, context, reads_rows=True, max_skipped_updates=skips
            )
        self.core = self.trained or frozen(ModelCore(self.model, settings, context, reads_rows=True))

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        """Column `ROLE_score`, such as `reward_model_score`: one number per row, read at its last token."""
        scores = self.core.evaluate(batch, self._forward)["values"]
        return Batch({f"{self.context.role}_score": scores.values})

    @remote("split_by_data_rank")
    def update(self, batch: Batch, *, loss: Loss) -> Metrics:
        """One optimizer step on exactly these rows. Metrics are named `reward_model/...`.

        Raises:
            BatchError: the loss reads a column that the batch lacks.
        """
        assert self.trained is not None, f"role {self.context.role!r} is not among trained_roles"
        return self.trained.update(batch, loss, self._forward)

    @remote("split_by_data_rank")
    def measure(self, batch: Batch, *, loss: Loss) -> Metrics:
        """What `update` would report of the loss, without an update."""
        assert self.trained is not None, f"role {self.context.role!r} is not among trained_roles"
        return self.trained.measure(batch, loss, self._forward)

    def _forward(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        return {"values": self.model(microbatch.packed)}
