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
        import torch

        from hybridflow.models.build import build_policy
        from hybridflow.parallel import fsdp
        from hybridflow.workers.model_spec import frozen_model

        super().__init__(config, context)
        self.model = build_policy(frozen_model(self.config, context, config.reference.path)).requires_grad_(False)
        if self.config.reference.offload_parameters:
            fsdp.move_model(self.model, torch.device("cpu"))

    @classmethod
    def layout_of(cls, config: Config, num_ranks: int) -> Layout:
        return training_layout(config, num_ranks)

    @remote("split_by_data_rank")
    def log_probs(self, batch: Batch) -> Batch:
        """Column `reference_log_probs`, in nats, at the temperature with which each row was sampled."""
        import torch

        from hybridflow.parallel import fsdp
        from hybridflow.workers.microbatches import Microbatches
        from hybridflow.workers.training import evaluate

        settings = self.config.reference
        if settings.offload_parameters:
            fsdp.move_model(self.model, self.context.device)
        microbatches = Microbatches(
            batch,
            self.context,
            tokens_per_microbatch=settings.tokens_per_microbatch,
            default_temperature=self.config.rollout.temperature or 1.0,
        )
        columns = evaluate(self.model, microbatches, self._forward)
        fsdp.drop_gathered(self.model)
        if settings.offload_parameters:
            fsdp.move_model(self.model, torch.device("cpu"))
        return Batch.from_columns(dict(columns))

    def _forward(self, microbatch: Microbatch) -> dict[str, torch.Tensor]:
        log_probs_R, _ = self.model(microbatch.packed, temperature=microbatch.temperature)
        return {"reference_log_probs": log_probs_R}
