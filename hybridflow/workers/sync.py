"""Weights from the actor to the engine, as the workers see it: in one process, or from pool to pool.

Colocated: `rollout.sync_weights()`. On separate pools, once `address = actor.transfer_address()` and both sides'
`open_transfer(address)`, then after each step `actor.send_weights.start()` together with `rollout.receive_weights()`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch

from hybridflow.config.schema import Config
from hybridflow.errors import listed
from hybridflow.metrics import Metric, Metrics
from hybridflow.resharding.links import TransferStore, host_transfer, join_transfer
from hybridflow.resharding.transfer import ColocatedSync, SyncReport, SyncSettings, WeightReceiver, WeightSender
from hybridflow.resharding.verify import Place
from hybridflow.rollout.base import Engine
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.workers.base import RankContext
from hybridflow.workers.probe import ScoresRows, probe
from hybridflow.workers.proof import PROBED_SYNCS, FlipsSigns, prove

logger = logging.getLogger("hybridflow")


@runtime_checkable
class HoldsWeights(Protocol):
    """A worker whose weights an engine can take."""

    def named_tensors(self) -> Sequence[tuple[str, torch.Tensor]]:
        """The current weights under their Hugging Face names, in an order that never changes, tied ones once."""
        ...


class RolloutSync:
    """The receiving side, one per rollout worker."""

    def __init__(self, config: Config, context: RankContext, engine: EngineThread):
        self.config, self.context, self.engine = config, context, engine
        self.num_syncs = 0
        self.unreadable: tuple[str, ...] = ()
        """Weights that the engine cannot show."""
        self.probe_difference: float | None = None
        """What the last probe found, in nats. No metric, since a resumed run probes again and has no metrics of its own."""
        self.colocated: ColocatedSync | None = None
        self.store: TransferStore | None = None
        """Where the actors' pool is met."""
        self.receiver: WeightReceiver | None = None

    def from_peer(self) -> Metrics:
        """Take the weights of the actor in this process. Every rank of the pool calls this.

        Raises:
            WeightMismatchError: the engine holds something else afterwards.
        """
        actor = self.context.peers["actor"]
        assert isinstance(actor, HoldsWeights), "role 'actor' has no named_tensors()"
        with self.engine.paused() as engine:
            if self.context.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the controller keeps what earlier calls reported
            report = self._sync(actor, engine)
            metrics = as_metrics(report)
            if self.context.device.type == "cuda":
                peak_gib = torch.cuda.max_memory_allocated() / 2**30
                metrics += Metrics({"sync/peak_allocated_gib": Metric(peak_gib, kind="max")})
            self.num_syncs += 1
            if self.num_syncs == 1 and report.unreadable and self.config.rollout.verify_weights:
                count, names = len(report.unreadable), listed(report.unreadable)
                logger.info("the engine cannot show %d weights (%s): their effect is probed", count, names)
                if isinstance(actor, FlipsSigns):
                    sync_again = partial(self._sync, actor, engine)
                    prove(report.unreadable, actor, engine, self.config, self.context, sync=sync_again)
            is_due = self.num_syncs <= PROBED_SYNCS or report.unreadable
            if is_due and self.config.rollout.verify_weights and isinstance(actor, ScoresRows):
                started = time.perf_counter()
                self.probe_difference = probe(engine, actor, self.config, self.context)
                metrics += Metrics({"sync/seconds_probe": Metric(time.perf_counter() - started, kind="max")})
        return metrics

    def _sync(self, actor: HoldsWeights, engine: Engine) -> SyncReport:
        if self.colocated is None:
            settings = sync_settings(self.config, self.context)
            self.colocated = ColocatedSync(settings, self.context.group, actor.named_tensors(), engine)
        return self.colocated.sync(actor.named_tensors(), engine)

    def open(self, address: str) -> None:
        """Meet the actors' pool at `host:port`."""
        self.store = join_transfer(address, device=self.context.device, timeout_s=self.config.run.peer_timeout_s)

    def receive(self) -> Metrics:
        """Take the weights that the actors send meanwhile.

        Raises:
            WeightMismatchError: the engine holds something else afterwards.
        """
        assert self.store is not None, "open_transfer comes before receive_weights"
        with self.engine.paused() as engine:
            if self.receiver is None:
                settings, num_ranks = sync_settings(self.config, self.context), self.context.layout.num_ranks
                self.receiver = WeightReceiver(settings, self.store, engine, rank=self.context.rank, num_ranks=num_ranks)
            report = self.receiver.receive(engine)
        self.unreadable = report.unreadable
        return as_metrics(report)


class ActorSync:
    """The sending side, one per actor worker."""

    def __init__(self, config: Config, context: RankContext):
        self.config, self.context = config, context
        self.stores: dict[str, TransferStore] = {}
        self.senders: dict[str, WeightSender] = {}
        """By the role of the engines that receive."""

    def address(self, receiver: str) -> str:
        """Open the rendezvous with the engines of a role on this rank: `host:port`."""
        device, timeout_s = self.context.device, self.config.run.peer_timeout_s
        self.stores[receiver], address = host_transfer(device=device, timeout_s=timeout_s)
        return address

    def open(self, address: str, receiver: str) -> None:
        """Meet the pool of the engines of a role at `host:port`."""
        if receiver not in self.stores:
            device, timeout_s = self.context.device, self.config.run.peer_timeout_s
            self.stores[receiver] = join_transfer(address, device=device, timeout_s=timeout_s)

    def send(self, tensors: Sequence[tuple[str, torch.Tensor]], receiver: str) -> Metrics:
        """Send these weights to every rank of a role that receives."""
        if receiver not in self.senders:
            assert receiver in self.stores, "open_transfer comes before send_weights"
            settings, num_ranks = sync_settings(self.config, self.context), self.context.layout.num_ranks
            store, rank = self.stores[receiver], self.context.rank
            self.senders[receiver] = WeightSender(settings, store, tensors, rank=rank, num_ranks=num_ranks)
        return as_metrics(self.senders[receiver].send(tensors), prefix="sync/send_")


def sync_settings(config: Config, context: RankContext) -> SyncSettings:
    """What the configuration says about syncs, on this rank. Both sides must come to the same dtype and bucket size."""
    return SyncSettings(
        dtype=config.rollout.dtype_on(context.device.type),
        bucket_bytes=config.rollout.sync_bucket_mib * 2**20,
        verify=config.rollout.verify_weights,
        device=context.device,
        place=Place(context.role, context.rank, is_sharded=context.layout.tensor > 1),
    )


def as_metrics(report: SyncReport, *, prefix: str = "sync/") -> Metrics:
    """Bytes as the mean over ranks, seconds as those of the slowest."""
    metrics = {f"{prefix}seconds_{part}": Metric(seconds, kind="max") for part, seconds in report.seconds.items()}
    metrics[f"{prefix}seconds"] = Metric(sum(report.seconds.values()), kind="max")
    metrics[f"{prefix}bytes_received"] = Metric(float(report.bytes_received))
    metrics[f"{prefix}bytes_missing"] = Metric(float(report.bytes_missing))
    metrics[f"{prefix}buffer_gib"] = Metric(report.buffer_bytes / 2**30, kind="max")
    metrics[f"{prefix}tensors_unreadable"] = Metric(float(len(report.unreadable)), kind="max")
    return Metrics(metrics)
