"""Process groups and device meshes of the training roles."""

from __future__ import annotations

import socket
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]  # public; torch's stubs lag
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hybridflow.parallel.layout import Layout
from hybridflow.parallel.sequence import SequenceGroup


def rendezvous_store(address: str, *, listening: socket.socket | None, timeout_s: float) -> Store:
    """The store at `host:port` by which ranks find each other. The rank whose socket is `listening` there serves it."""
    host, _, port = address.rpartition(":")
    return TCPStore(
        host,
        int(port),
        is_master=listening is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=None if listening is None else listening.detach(),
    )


def init_process_group(
    *, rank: int, world_size: int, rendezvous: str | Store, device: torch.device, timeout_s: float | None = None
) -> None:
    """Join torch.distributed's default group: gloo on the CPU, and NCCL beside it for CUDA tensors.

    `rendezvous` is the same on all ranks, a store or a URL that torch knows (`tcp://host:port`, `file:///path`); returns
    when all have joined. A collective that takes longer than `timeout_s` raises; None leaves torch's own limit.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device.index or 0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
        init_method=rendezvous if isinstance(rendezvous, str) else None,
        store=None if isinstance(rendezvous, str) else rendezvous,
        rank=rank,
        world_size=world_size,
        timeout=None if timeout_s is None else timedelta(seconds=timeout_s),
    )


def ensure_process_group(device: torch.device) -> None:
    """Where no group was joined, make one of this process alone: FSDP needs one, and one rank is no special case."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


@cache
def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The ranks of the pool with the axes `data` and `sequence`; all roles with one layout share it.

    Every rank must call this for the same layouts in the same order.
    """
    ensure_process_group(torch.device(device_type))
    assert layout.tensor == 1, "training does not shard weight matrices over a tensor axis"
    found = dist.get_world_size()
    assert layout.num_ranks == found, f"the layout is of {layout.num_ranks} ranks, the process group of {found}"
    return init_device_mesh(device_type, (layout.data, layout.sequence), mesh_dim_names=("data", "sequence"))


@cache
def shard_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The ranks over which FSDP2 shards weights: data and sequence in one axis."""
    build_mesh(layout, device_type)
    return init_device_mesh(device_type, (layout.num_ranks,), mesh_dim_names=("shard",))


def sequence_group(layout: Layout, device_type: str) -> SequenceGroup | None:
    """The ranks that share this rank's rows; None where there is one."""
    if layout.sequence == 1:
        return None
    axis = build_mesh(layout, device_type)["sequence"]
    return SequenceGroup(axis.get_group(), axis.get_local_rank(), layout.sequence)
