"""Parts that fail in the middle of a run."""

from __future__ import annotations

import time
from pathlib import Path

from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.remote import remote
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker


class DividesByZero(Algorithm):
    """Fails on the controller, while its groups are busy."""

    actor: ActorWorker
    rollout: RolloutWorker
    reward: RewardWorker

    def collect(self, prompts: Batch) -> Batch:
        self.rollout.generate.start(prompts)
        raise ZeroDivisionError("one response to no prompts")

    def learn(self, batch: Batch) -> Metrics:
        return Metrics()


class SaysGoodbye(RewardWorker):
    """Leaves a file in the run's folder when it is closed."""

    @remote("one_to_all")
    def close(self) -> None:
        Path(self.config.run.folder, "closed").touch()


class NeverCloses(RewardWorker):
    """Would hold up whoever waits for it."""

    @remote("one_to_all")
    def close(self) -> None:
        time.sleep(600)


class SendsNothing(ActorWorker):
    """Fails where engines of another pool wait for its weights."""

    @remote("one_to_all")
    def send_weights(self, receiver: str = "rollout") -> Metrics:
        raise RuntimeError("nothing was sent")
