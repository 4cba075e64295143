"""Keeping the weights of the rollout engines equal to the actor's."""

from __future__ import annotations

from hybridflow.controller.launch import Launched
from hybridflow.metrics import Metrics


class WeightSync:
    """Brings the actor's weights to the engines whenever they have changed."""

    def __init__(self, launched: Launched, *, lets_sleep: bool):
        self.actor, self.rollout = launched.actor, launched.rollout
        self.is_needed = self.actor is not None and self.rollout is not None
        self.is_colocated = self.is_needed and launched.places["actor"].pool == launched.places["rollout"].pool
        self.is_open = False
        self.synced_updates: int | None = None
        """Updates behind the weights that the engines have; None where they may have none."""
        self.lets_sleep = lets_sleep
        self.is_asleep = False

    def sleep(self) -> None:
        """Nothing is generated until the next sync: the engines give their memory to training, where that is configured."""
        if self.lets_sleep and self.rollout is not None:
            self.rollout.sleep.start()
            self.is_asleep = True
            self.synced_updates = None  # an engine may drop its weights while it sleeps

    def sync(self) -> Metrics:
        """Wake the engines, and make their weights those of the actor if they are not. `sync/...` says what it took.

        Raises:
            WeightMismatchError: an engine holds something else afterwards.
        """
        if self.is_asleep and self.rollout is not None:
            self.rollout.wake()
            self.is_asleep = False
        if self.actor is None or not self.is_needed:
            return Metrics()
        num_updates = self.actor.num_updates()
        if num_updates == self.synced_updates:
            return Metrics()
        metrics = self._within_pool() if self.is_colocated else self._between_pools()
        self.synced_updates = num_updates
        return metrics

    def _within_pool(self) -> Metrics:
        assert self.rollout is not None
        return self.rollout.sync_weights()

    def _between_pools(self) -> Metrics:
        assert self.actor is not None and self.rollout is not None
        if not self.is_open:
            address = self.actor.transfer_address()
            opening = self.actor.open_transfer.start(address)
            self.rollout.open_transfer(address)
            opening.result()
            self.is_open = True
        sending = self.actor.send_weights.start()
        received = self.rollout.receive_weights()
        return received + sending.result()
