"""The base of the roles that have a model: how its rows are sharded over ranks, and what training keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridflow.parallel.layout import Layout
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import remote

if TYPE_CHECKING:
    from hybridflow.config.schema import Config
    from hybridflow.workers.training import TrainingCore


class ModelWorker(Worker):
    """A share of a model. Rows are sharded over the data axis, the tokens of a row over `model.sequence_parallel` ranks."""

    trained: TrainingCore | None = None
    """The model with its optimizer, set by `__init__` where it is trained."""

    @classmethod
    def imports(cls, config: Config) -> tuple[str, ...]:
        return ("hybridflow.models.build", "hybridflow.workers.model_spec", "hybridflow.workers.training")

    @classmethod
    def layout_of(cls, config: Config, num_ranks: int) -> Layout:
        sequence = config.model.sequence_parallel
        assert num_ranks % sequence == 0, f"{num_ranks} ranks do not divide into groups of {sequence}; config/rules checks this"
        return Layout(data=num_ranks // sequence, sequence=sequence)

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        """The learning rate of this step's updates."""
        if self.trained is not None:
            self.trained.begin_step(step, total_steps)

    @remote("one_to_all")
    def end_run(self) -> None:
        """Raises DivergenceError where the run ends with half of this model's updates, two or more, skipped."""
        if self.trained is not None:
            self.trained.end_run()

    @remote("one_to_all")
    def save(self, folder: str) -> None:
        """Weights, optimizer and random state of a model that is trained, every rank its shares."""
        if self.trained is not None:
            self.trained.save(folder)

    @remote("one_to_all")
    def restore(self, folder: str) -> None:
        """Read the state that `save` wrote, by any number of ranks."""
        if self.trained is not None:
            self.trained.restore(folder)
