"""FSDP2: parameters sharded over all ranks, gathered layer by layer, gradients summed in float32.

The master weights of a trained model are float32; `compute_dtype` is what layers see.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How a model is sharded."""

    mesh: DeviceMesh
    """One axis: all ranks that hold a share."""
    compute_dtype: torch.dtype
    """Of parameters while layers compute."""
    device: torch.device

    @property
    def num_ranks(self) -> int:
        return self.mesh.size()


def shard(model: nn.Module, layers: Iterable[nn.Module], *, in_float32: Sequence[nn.Module] = (), sharding: Sharding) -> None:
    """Cut `model` in place: each of `layers` is gathered by itself, what is outside them together.

    Values come from rank 0, where `model` is whole on the CPU; other ranks bring a skeleton on the meta device. Modules
    of `in_float32` compute in float32. Every rank calls this.
    """
    is_source = dist.get_rank() == 0
    whole = {name: parameter.detach() for name, parameter in model.named_parameters()} if is_source else {}
    # With one rank nothing is gathered from others, and dropping the cast weights between forward and backward buys little.
    reshard = sharding.num_ranks > 1
    mixed = MixedPrecisionPolicy(param_dtype=sharding.compute_dtype, reduce_dtype=torch.float32)
    exact = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=sharding.mesh, mp_policy=mixed, reshard_after_forward=reshard)
    for module in in_float32:
        fully_shard(module, mesh=sharding.mesh, mp_policy=exact, reshard_after_forward=reshard)
    fully_shard(model, mesh=sharding.mesh, mp_policy=mixed, reshard_after_forward=False)
    for unit in _units(model):
        # Losses are divided by a count over all ranks, so gradients are to be added up and never averaged.
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)
    if sharding.num_ranks > 1:
        _receive_values(model, whole, sharding)


@torch.no_grad()
def _receive_values(model: nn.Module, whole: dict[str, torch.Tensor], sharding: Sharding) -> None:
    """Give every rank its shares of rank 0's parameters, and its buffers; one tensor is whole at a time."""
    is_source = dist.get_rank() == 0
    if not is_source:
        model.to_empty(device=sharding.device)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} was not sharded"
        empty = partial(torch.empty, parameter.shape, dtype=parameter.dtype, device=sharding.device)
        full = whole.pop(name).to(sharding.device) if is_source else empty()
        parameter.to_local().copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements).to_local())
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def _units(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def drop_gathered(model: nn.Module) -> None:
    """Free gathered weights that a forward pass without a backward one left behind."""
    for unit in _units(model):
        unit.reshard()


def reduce_gradients(model: nn.Module, in_next_backward: bool) -> None:
    """Say whether the coming backward pass sums gradients over ranks and leaves each its share; that of an update's last
    microbatch must."""
    assert isinstance(model, FSDPModule), "shard the model first"
    model.set_requires_gradient_sync(in_next_backward)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """This rank's shares of the gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


@torch.no_grad()
def gradient_norm(gradients: Sequence[torch.Tensor], group: dist.ProcessGroup | None) -> torch.Tensor:
    """L2 norm over all shares of all ranks of `group`: a float32 scalar on the device, the same on every rank."""
    norms = torch._foreach_norm(list(gradients))
    squared = torch.stack(norms).float().square().sum()
    dist.all_reduce(squared, group=group)
    return squared.sqrt()


@torch.no_grad()
def scale_gradients(gradients: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Scale the shares in place so that the global norm is at most `max_norm`; the host waits for nothing."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), factor)


def move_model(model: nn.Module, device: torch.device) -> None:
    """Move this rank's shares of the weights."""
    drop_gathered(model)
    model.to(device)


@torch.no_grad()
def move_optimizer(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Move this rank's shares of the optimizer's state."""
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = value.to(device, non_blocking=True)
    if device.type == "cpu" and torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies must have landed before anyone reads or frees them
