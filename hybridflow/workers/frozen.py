"""A model that only computes: the reference, reward models in use."""

from __future__ import annotations

from collections.abc import Callable

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import ReferenceConfig, TrainingConfig
from hybridflow.models.heads import ValueModel
from hybridflow.models.policy import PolicyModel
from hybridflow.parallel import fsdp
from hybridflow.workers.base import RankContext
from hybridflow.workers.finite import WeightCheck
from hybridflow.workers.microbatches import Microbatch, Microbatches
from hybridflow.workers.training import CPU, Outputs, evaluate


class FrozenCore:
    """A sharded model without an optimizer. A worker has one and lends it its forward pass."""

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        config: TrainingConfig | ReferenceConfig,
        context: RankContext,
        *,
        temperature: float = 1.0,
        reads_rows: bool = False,
    ):
        self.model, self.config, self.context = model.requires_grad_(False), config, context
        self.temperature, self.reads_rows = temperature, reads_rows
        WeightCheck(context).check(model.named_parameters(), when="when the model was loaded")
        if config.offload_parameters:
            fsdp.move_model(model, CPU)

    def evaluate(self, batch: Batch, forward: Callable[[Microbatch], Outputs]) -> dict[str, Ragged]:
        """What `forward` gives for each response token, or each row, of the batch, in the order of its rows."""
        if self.config.offload_parameters:
            fsdp.move_model(self.model, self.context.device)
        microbatches = Microbatches(
            batch,
            self.context,
            tokens_per_microbatch=self.config.forward_tokens,
            default_temperature=self.temperature,
            reads_rows=self.reads_rows,
        )
        columns = evaluate(self.model, microbatches, forward)
        fsdp.drop_gathered(self.model)
        if self.config.offload_parameters:
            fsdp.move_model(self.model, CPU)
        return columns
