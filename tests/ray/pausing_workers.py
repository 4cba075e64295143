"""Workers that stop at an interesting moment of step 7, once in a run's folder, so that the run can be killed there.

Where a run has stopped is in the file `paused` of its folder. A run that finds the file does not stop again.
"""

from __future__ import annotations

import time
from pathlib import Path

from hybridflow.batch import Batch
from hybridflow.config.schema import Config
from hybridflow.metrics import Metrics
from hybridflow.ops import Loss
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.remote import remote
from hybridflow.workers.reward import RewardWorker

STEP = 7
PAUSE_S = 60.0
MARKER = "paused"


def pause(config: Config, step: int) -> None:
    """Say that this is the moment, and wait to be killed."""
    marker = Path(config.run.folder, MARKER)
    if step == STEP and not marker.exists():
        marker.touch()
        time.sleep(PAUSE_S)


class PausesInCollect(RewardWorker):
    """Stops when responses are there and not yet scored."""

    scores_whole_batches = False
    step = 0

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        self.step = step

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        pause(self.config, self.step)
        return super().score(batch)


class PausesInLearn(ActorWorker):
    """Stops when one of the step's two updates of the actor is made."""

    step = updates_of_step = 0

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        self.step, self.updates_of_step = step, 0
        super().begin_step(step, total_steps)

    @remote("split_by_data_rank")
    def update(self, batch: Batch, *, loss: Loss) -> Metrics:
        self.updates_of_step += 1
        if self.updates_of_step == 2:
            pause(self.config, self.step)
        return super().update(batch, loss=loss)


class PausesInSave(CriticWorker):
    """Stops in the middle of a checkpoint: actor and data are written, the critic is not."""

    step = 0

    @remote("one_to_all")
    def begin_step(self, step: int, total_steps: int) -> None:
        self.step = step
        super().begin_step(step, total_steps)

    @remote("one_to_all")
    def save(self, folder: str) -> None:
        pause(self.config, self.step)
        super().save(folder)
