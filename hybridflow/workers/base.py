"""The base of every role: how a worker is built, and what its process tells it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

from hybridflow.config.schema import Config
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.planner.decisions import resolved
from hybridflow.workers.remote import Dispatcher, remote

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from hybridflow.batch import Batch


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Where a worker runs. One process holds several workers; they share this but for `role` and `layout`."""

    role: str
    rank: int
    """Within the pool, from 0."""
    layout: Layout
    """How this role shards its model and rows over the ranks of the pool."""
    device: torch.device
    group: ProcessGroup | None = None
    """All ranks of the pool; None where torch.distributed is not initialised (one rank without training)."""
    peers: dict[str, Worker] = field(default_factory=dict)
    """The other workers of this process by role, filled as they are created."""
    reported: list[Metrics] = field(default_factory=list)
    """What `report` was given since `take_reported`."""

    def report(self, metrics: Metrics) -> None:
        """Have metrics logged with those of the step, from any method that the controller has called, whatever it returns.

        Example: `self.context.report(Metrics({"judge/words": 12.0}))`.
        """
        self.reported.append(metrics)

    def take_reported(self) -> Metrics:
        """What was reported since the last time; for whoever carries it to the controller."""
        taken = Metrics.merged(self.reported)
        self.reported.clear()
        return taken

    @property
    def data_rank(self) -> int:
        return self.layout.data_rank(self.rank)


class Worker:
    """A role on one rank. Subclasses build their state in `__init__` from the configuration and the context.

    Methods marked `@remote(protocol)` can be called on the group; their arguments and results must pickle.
    """

    is_distributed: ClassVar[bool] = True
    """Whether the ranks of this role talk to each other through torch.distributed."""
    dispatcher: Dispatcher | None = None
    """Set on the controller's handle for the group, None on a rank."""

    def __init__(self, config: Config, context: RankContext):
        self.config = resolved(config)  # built without a plan, `auto` is off
        self.context = context

    @classmethod
    def imports(cls, config: Config) -> tuple[str, ...]:
        """Modules that a worker of this role needs once it is built, whose import takes long: begun as soon as its process is
        there, while the cluster still starts."""
        return ()

    @classmethod
    def layout_of(cls, config: Config, num_ranks: int) -> Layout:
        """How this role uses `num_ranks` ranks. By default every rank works on its own rows."""
        return Layout(data=num_ranks)

    @classmethod
    def group(cls, dispatcher: Dispatcher) -> Self:
        """The controller's handle for all workers of this role: no state, calls go to `dispatcher`."""
        handle = cls.__new__(cls)
        handle.dispatcher = dispatcher
        return handle

    @remote("split_by_data_rank")
    def compute(self, batch: Batch, function: Callable[[Batch, RankContext], Batch]) -> Batch:
        """New columns for `batch`, computed where its data is by `function(rows of this rank, context)`."""
        return function(batch, self.context)

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        """Called on every role before step `step` of `total_steps`, both from 1; learning rates follow it."""

    @remote("one_to_all")
    def end_run(self) -> None:
        """Called on every role when the last step has been learned from, before it is saved."""

    @remote("one_to_all")
    def save(self, folder: str) -> None:
        """Write this role's state below `folder`, which exists. Roles without state write nothing."""

    @remote("one_to_all")
    def restore(self, folder: str) -> None:
        """Read the state that `save` wrote, by any number of ranks."""

    @remote("one_to_all")
    def close(self) -> None:
        """Release what the process would not release by ending."""
