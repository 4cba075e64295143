"""The pretraining role: text that updates of the policy also learn from, beside the rows that were generated."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.data.chat import load_tokenizer
from hybridflow.data.loader import read_rows
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.remote import remote


class PretrainingWorker(Worker):
    """Rows of `algorithm.pretraining_files`. Which ones come follows from seed, step and update alone, so that a resumed run
    needs no state of it."""

    is_distributed: ClassVar[bool] = False

    def __init__(self, config: Config, context: RankContext):
        super().__init__(config, context)
        if context.rank == 0:
            key = "algorithm.pretraining_files"
            files = vars(config.algorithm.options)["pretraining_files"]
            self.dataset = read_rows(config, files, load_tokenizer(config), "responses", key=key)

    @remote("rank_zero")
    def next_rows(self, step: int, update: int, num_updates: int, count: int) -> Batch:
        """`count` rows of text for one of the updates of a step: in the files' order of this seed, epoch by epoch.

        Raises:
            DataError: a row cannot be read.
        """
        first = ((step - 1) * num_updates + update) * count
        epochs, places = np.divmod(np.arange(first, first + count), len(self.dataset))
        orders = {
            epoch: np.random.default_rng([self.config.run.seed, epoch]).permutation(len(self.dataset))
            for epoch in np.unique(epochs).tolist()
        }
        rows = np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)])
        return Batch.from_columns(self.dataset.columns(rows))
