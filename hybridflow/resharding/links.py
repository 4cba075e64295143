"""How a bucket's shards reach the rank that assembles them: from this process, by an all-gather among ranks that both
train and generate, or by broadcasts from a pool that trains to a pool that generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # public; torch's stubs lag

try:
    from torch.distributed import all_gather_single
except ImportError:  # torch before 2.13 knows the same function by its older name
    from torch.distributed import all_gather_into_tensor as all_gather_single

from hybridflow.errors import EngineError
from hybridflow.resharding.buckets import Bucket, Slot


class Work(Protocol):
    """A collective under way, as torch.distributed returns it."""

    def wait(self) -> object:
        """On the CPU, wait; on CUDA, make the current stream wait."""
        ...


class Broadcaster(Protocol):
    """What is used of torch's process groups."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> Work:
        """Start sending `tensor` of rank `root` into `tensor` of all others."""
        ...


@dataclass
class Arriving:
    """A bucket under way."""

    flat: torch.Tensor
    """Shape [shards, shard_elements]; valid after `wait`."""
    works: list[Work] = field(default_factory=list)
    bytes_received: int = 0

    def wait(self) -> None:
        """Make what follows see the bucket."""
        for work in self.works:
            work.wait()
        self.works.clear()

    def tensor(self, slot: Slot) -> torch.Tensor:
        """The whole tensor of `slot`: a view where its rows stand in order, else a copy."""
        padded = self.flat[:, slot.offset : slot.offset + slot.shard_elements].reshape(-1, *slot.shape[1:])
        return padded[: slot.num_rows].view(slot.shape)


def gather(packed: torch.Tensor, into: torch.Tensor, group: dist.ProcessGroup) -> Arriving:
    """All-gather of every rank's row, without waiting. On CUDA it runs in NCCL's own stream beside what follows."""
    arriving = Arriving(into, bytes_received=packed.nbytes * (group.size() - 1))
    work = all_gather_single(into.view(-1), packed, group=group, async_op=True)
    assert work is not None, "this rank is not in the group"
    arriving.works.append(work)
    return arriving


def receive(bucket: Bucket, into: torch.Tensor, groups: Sequence[Broadcaster]) -> Arriving:
    """Every trainer's row, each from the group that it shares with all receivers, without waiting."""
    assert len(groups) == bucket.num_shards, "one group per shard"
    works = [group.broadcast(into[shard], 0) for shard, group in enumerate(groups)]
    return Arriving(into, works, into.nbytes)


@dataclass(frozen=True)
class TransferStore:
    """Where the ranks of two pools meet: small values by name, and groups that belong to neither pool's own."""

    store: Store
    device: torch.device
    timeout: timedelta

    def group(self, name: str, rank: int, num_ranks: int) -> Broadcaster:
        """Join a group that spans both pools; returns when all `num_ranks` have."""
        prefixed = PrefixStore(name, self.store)
        if self.device.type != "cuda":
            return cast(Broadcaster, dist.ProcessGroupGloo(prefixed, rank, num_ranks, self.timeout))
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout  # no public name sets it for a group that stands by itself
        return cast(Broadcaster, dist.ProcessGroupNCCL(prefixed, rank, num_ranks, options))

    def put(self, name: str, value: str) -> None:
        """Publish a value."""
        self.store.set(name, value)

    def get(self, name: str) -> bytes:
        """Wait for a value.

        Raises:
            EngineError: nobody published it in time.
        """
        try:
            return bytes(self.store.get(name))
        except dist.DistStoreError as error:
            raise EngineError(f"the other pool did not publish {name!r} within {self.timeout}; is it running?") from error


def host_transfer(*, device: torch.device, timeout_s: float) -> tuple[TransferStore, int]:
    """Open the meeting place in this process; the second value is its port."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=timeout)
    return TransferStore(store, device, timeout), store.port


def join_transfer(address: str, *, device: torch.device, timeout_s: float) -> TransferStore:
    """Reach a meeting place at `host:port`.

    Raises:
        EngineError: nothing answers there.
    """
    host, _, port = address.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
    except dist.DistError as error:
        raise EngineError(
            f"the pool that trains offers its weights at {address}, but nothing answers there: {error}"
        ) from error
    return TransferStore(store, device, timeout)
