"""How a bucket's segments reach the ranks that read them: by an all-gather or by messages among ranks that both train and
generate, or by broadcasts from a pool that trains to a pool that generates."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public; torch's stubs lag

try:
    from torch.distributed import all_gather_single
except ImportError:  # torch before 2.13 knows the same function by its older name
    from torch.distributed import all_gather_into_tensor as all_gather_single

from hybridflow.errors import EngineError
from hybridflow.parallel.addresses import own_host
from hybridflow.parallel.mesh import rendezvous_store


@dataclass
class UnderWay:
    """Messages of one bucket that were started."""

    works: list[dist.Work] = field(default_factory=list)
    bytes_received: int = 0

    def wait(self) -> None:
        """Make what follows see what was received, and leave what was sent."""
        for work in self.works:
            work.wait()
        self.works.clear()


def gather(segments: Sequence[torch.Tensor], own: int, group: dist.ProcessGroup) -> UnderWay:
    """Every rank's segment to every rank, without waiting. On CUDA it runs in NCCL's own stream beside what follows.

    `segments` are equally long neighbours in one buffer, that of this rank, number `own`, filled in.
    """
    length = len(segments[0])
    into = segments[0].as_strided((length * len(segments),), (1,))
    work = all_gather_single(into, segments[own], group=group, async_op=True)
    assert work is not None, "this rank is not in the group"
    return UnderWay([work], (len(segments) - 1) * segments[0].nbytes)


def exchange(outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor], group: dist.ProcessGroup) -> UnderWay:
    """One message to each rank of the group in `outgoing` and one from each in `incoming`, without waiting."""
    operations = []
    for rank in range(group.size()):
        peer = dist.get_global_rank(group, rank)
        if rank in outgoing:
            operations.append(dist.P2POp(dist.isend, outgoing[rank], peer, group))
        if rank in incoming:
            operations.append(dist.P2POp(dist.irecv, incoming[rank], peer, group))
    works = dist.batch_isend_irecv(operations) if operations else []
    return UnderWay([*works], sum(segment.nbytes for segment in incoming.values()))


def receive(segments: Sequence[torch.Tensor], groups: Sequence[dist.ProcessGroup]) -> UnderWay:
    """Every trainer's segment, each from the group that it shares with the ranks that read the same, without waiting."""
    works = [group.broadcast(segment, 0) for segment, group in zip(segments, groups, strict=True) if len(segment)]
    return UnderWay(works, sum(segment.nbytes for segment in segments))


@dataclass(frozen=True)
class TransferStore:
    """Where the ranks of two pools meet: small values by name, and groups that belong to neither pool's own."""

    store: Store
    device: torch.device
    timeout: timedelta

    def group(self, name: str, rank: int, num_ranks: int) -> dist.ProcessGroup:
        """Join a group that spans both pools; returns when all `num_ranks` have."""
        prefixed = PrefixStore(name, self.store)
        if self.device.type != "cuda":
            return cast(dist.ProcessGroup, dist.ProcessGroupGloo(prefixed, rank, num_ranks, self.timeout))
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self.timeout  # no public name sets it for a group that stands by itself
        return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(prefixed, rank, num_ranks, options))

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


def host_transfer(*, device: torch.device, timeout_s: float) -> tuple[TransferStore, str]:
    """Open the rendezvous in this process; the second value is its `host:port`."""
    listening = socket.create_server((own_host(), 0))
    address = f"{own_host()}:{listening.getsockname()[1]}"
    store = rendezvous_store(address, listening=listening, timeout_s=timeout_s)
    return TransferStore(store, device, timedelta(seconds=timeout_s)), address


def join_transfer(address: str, *, device: torch.device, timeout_s: float) -> TransferStore:
    """Reach a rendezvous at `host:port`.

    Raises:
        EngineError: nothing answers there.
    """
    try:
        store = rendezvous_store(address, listening=None, timeout_s=timeout_s)
    except dist.DistError as error:
        raise EngineError(
            f"the pool that trains offers its weights at {address}, but nothing answers there: {error}"
        ) from error
    return TransferStore(store, device, timedelta(seconds=timeout_s))
