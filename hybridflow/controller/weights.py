"""Keeping the weights of the rollout engines equal to the actor's."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from typing import TypeVar

from hybridflow.controller.launch import Launched
from hybridflow.controller.waiting import DEATHS_SHOW_S
from hybridflow.errors import HybridflowError, WeightMismatchError, WorkerDiedError
from hybridflow.metrics import Metrics
from hybridflow.workers.proof import PROBED_SYNCS, kinds_of, not_taken
from hybridflow.workers.remote import Future
from hybridflow.workers.rollout import RolloutWorker

T = TypeVar("T")


class WeightSync:
    """Brings the actor's weights to the engines of a role whenever they have changed."""

    def __init__(
        self,
        launched: Launched,
        *,
        engines: RolloutWorker | None,
        role: str = "rollout",
        lets_sleep: bool = False,
        verifies: bool = False,
    ):
        """With `verifies`, engines of other pools are probed after the first syncs; those of the actor's do it themselves."""
        self.actor, self.rollout, self.role = launched.actor, engines, role
        self.is_needed = self.actor is not None and self.rollout is not None
        self.is_colocated = self.is_needed and launched.places["actor"].pool == launched.places[role].pool
        self.is_open = False
        self.synced_updates: int | None = None
        """Updates behind the weights that the engines have; None where they may have none."""
        self.lets_sleep = lets_sleep
        self.probes_left = PROBED_SYNCS if verifies else 0
        self.falling_asleep: Future[None] | None = None
        """The call after which the engines sleep; None while they are awake."""

    def sleep(self) -> None:
        """Nothing is generated until the next sync: the engines give their memory to training, where that is configured."""
        if self.lets_sleep and self.rollout is not None:
            self.falling_asleep = self.rollout.sleep.start()
            self.synced_updates = None  # an engine may drop its weights while it sleeps

    def sync(self, *, version: int) -> Metrics:
        """Wake the engines, and make their weights those of the actor, policy `version`, if they are not. `sync/...` says what
        it took.

        Raises:
            WeightMismatchError: an engine holds something else afterwards.
        """
        if self.falling_asleep is not None and self.rollout is not None:
            self.falling_asleep.result()  # raises what went wrong there
            self.rollout.wake_up()
            self.falling_asleep = None
        if self.actor is None or not self.is_needed:
            return Metrics()
        num_updates = self.actor.num_updates()
        if num_updates == self.synced_updates:
            return Metrics()
        metrics = self._within_pool(version) if self.is_colocated else self._between_pools(version)
        self.synced_updates = num_updates
        return metrics

    def _within_pool(self, version: int) -> Metrics:
        assert self.rollout is not None
        return self.rollout.sync_weights(version)

    def _between_pools(self, version: int) -> Metrics:
        assert self.actor is not None and self.rollout is not None
        if not self.is_open:
            address = self.actor.transfer_address(self.role)
            _both(self.actor.open_transfer.start(address, self.role), self.rollout.open_transfer.start(address))
            self.is_open = True
        metrics = self._transfer(version)
        if self.probes_left:
            self._probe(self.rollout.unreadable_weights() if self.probes_left == PROBED_SYNCS else (), version)
            self.probes_left -= 1
        return metrics

    def _transfer(self, version: int) -> Metrics:
        assert self.actor is not None and self.rollout is not None
        sent, received = _both(self.actor.send_weights.start(self.role), self.rollout.receive_weights.start(version))
        return received + sent

    def _probe(self, unreadable: Sequence[str], version: int) -> None:
        """Engines and trainer compute the same; and with other values of what engines cannot show as well.

        Raises:
            WeightMismatchError: they do not.
        """
        if (difference := self._probe_difference()) is not None:
            raise WeightMismatchError(
                f"after the weight sync an engine gives probe tokens log-probabilities that differ from the trainer's by up to "
                f"{difference:.3g} nats. Either weights did not arrive, or the engine does not compute this model as training "
                "does. rollout.verify_weights=false turns this check off"
            )
        if not unreadable:
            return
        assert self.actor is not None
        self.actor.flip_signs(unreadable)
        self._transfer(version)
        difference = self._probe_difference()
        self.actor.flip_signs(unreadable)
        self._transfer(version)
        if difference is not None:
            raise WeightMismatchError(not_taken(kinds_of(unreadable), difference))

    def _probe_difference(self) -> float | None:
        """The largest of a token, in nats, where that is above what is allowed."""
        assert self.actor is not None and self.rollout is not None
        rows = self.rollout.probe_rows()
        found = self.actor.probe_differences(rows)["difference"]
        return None if (found <= rows["tolerance"]).all() else float(found.max())


def _both(sending: Future[T], receiving: Future[T]) -> tuple[T, T]:
    """The results of calls of two groups that wait for each other: where one fails the other may never end.

    Raises:
        HybridflowError: that of the first to fail; of a process that has ended where there is one, since it is what the other
            group's error comes from.
    """
    threads = ThreadPoolExecutor(max_workers=2)
    calls = [threads.submit(future.result) for future in (sending, receiving)]
    threads.shutdown(wait=False)
    try:
        for ended in as_completed(calls):
            ended.result()
    except HybridflowError as first:
        ended_calls, _ = wait(calls, timeout=DEATHS_SHOW_S)
        errors = [call.exception() for call in ended_calls]
        raise next((error for error in errors if isinstance(error, WorkerDiedError)), first) from None
    return calls[0].result(), calls[1].result()
