"""A model on a rank: it computes on the rows of a batch, microbatch by microbatch, and may wait in CPU memory meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import ReferenceConfig, TrainingConfig
from hybridflow.models.heads import ValueModel
from hybridflow.models.policy import PolicyModel
from hybridflow.parallel import fsdp
from hybridflow.workers.base import RankContext
from hybridflow.workers.finite import WeightCheck
from hybridflow.workers.microbatches import Microbatch, Microbatches

CPU = torch.device("cpu")
Outputs = dict[str, torch.Tensor]
"""What the model gives at each trained response token: name -> [R]."""


class ModelCore:
    """A sharded model. A worker has one and lends it its forward pass."""

    def __init__(
        self,
        model: PolicyModel | ValueModel,
        config: TrainingConfig | ReferenceConfig,
        context: RankContext,
        *,
        temperature: float = 1.0,
        reads_rows: bool = False,
    ):
        self.model, self.section, self.context = model, config, context
        self.temperature = temperature
        """Of rows without a column that says with which they were sampled."""
        self.reads_rows = reads_rows
        """Whether the model gives one number for each row, at its last token."""
        self.weights = WeightCheck(context, config=config)
        self.weights.check(model.named_parameters(), when="when the model was loaded")

    @torch.no_grad()
    def evaluate(self, batch: Batch, forward: Callable[[Microbatch], Outputs]) -> dict[str, Ragged]:
        """What `forward` gives for each response token, or each row, in the order of the batch's rows, without gradients."""
        microbatches = self.microbatches(batch, self.section.forward_tokens)
        collected: dict[str, list[torch.Tensor]] = {}
        with self.on_device():
            self.model.eval()
            for microbatch in microbatches:
                for name, output in forward(microbatch).items():
                    collected.setdefault(name, []).append(output)
            return {name: microbatches.gather_rows(parts) for name, parts in collected.items()}

    def microbatches(self, batch: Batch, tokens: int) -> Microbatches:
        """The rows of a batch as they go through this model, at most `tokens` of them at once."""
        return Microbatches(
            batch,
            self.context,
            tokens_per_microbatch=tokens,
            default_temperature=self.temperature,
            reads_rows=self.reads_rows,
        )

    def onload(self, *, with_optimizer: bool = False) -> None:
        """Bring to the device what is offloaded."""
        if self.section.offload_parameters:
            fsdp.move_model(self.model, self.context.device)

    def offload(self) -> None:
        """Give back gathered weights, and what the configuration keeps in CPU memory while the role is idle."""
        fsdp.drop_gathered(self.model)
        if self.section.offload_parameters:
            fsdp.move_model(self.model, CPU)

    @contextmanager
    def on_device(self, *, with_optimizer: bool = False) -> Iterator[None]:
        """A block in which everything is on the device."""
        self.onload(with_optimizer=with_optimizer)
        try:
            yield
        finally:
            self.offload()


def frozen(core: ModelCore) -> ModelCore:
    """A model that only computes: the reference, reward models in use.

    Its weights go on saying that they require gradients, though nobody asks for any: compiled layers are made for what weights
    say, and so the reference takes those that were compiled for the actor.
    """
    core.offload()
    return core
