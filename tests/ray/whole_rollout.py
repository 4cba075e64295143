"""A rollout role of one's own, which answers all rows in one call: it is scored after generation."""

from __future__ import annotations

from typing import ClassVar

from hybridflow.batch import Batch
from hybridflow.rollout.base import Sampling
from hybridflow.workers.remote import remote
from hybridflow.workers.rollout import RolloutWorker


class WholeRollout(RolloutWorker):
    """Generates as the built-in role does, but says that it is to be asked for whole batches only."""

    answers_row_by_row: ClassVar[bool] = False

    @remote("split_by_data_rank")
    def generate(self, batch: Batch, *, sampling: Sampling | None = None) -> Batch:
        """As of RolloutWorker."""
        return RolloutWorker.generate.function(self, batch, sampling=sampling)
