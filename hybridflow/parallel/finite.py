"""Which tensors hold numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor

MOST_NAMED = 3
NamedTensors = Iterable[tuple[str, torch.Tensor | None]]


def share_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of it."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


@torch.no_grad()
def norms(tensors: NamedTensors) -> dict[str, torch.Tensor]:
    """As `largest`, on the device and without waiting for it."""
    shares = {name: share for name, tensor in tensors if tensor is not None and (share := share_of(tensor)).numel()}
    if any(share.device.type == "cpu" for share in shares.values()):  # where that norm is five times slower than the extremes
        return {name: torch.stack(torch.aminmax(share)).abs().max() for name, share in shares.items()}
    return dict(zip(shares, torch._foreach_norm(list(shares.values()), float("inf")), strict=True)) if shares else {}


def largest(tensors: NamedTensors) -> dict[str, float]:
    """The largest absolute value in this rank's share of each tensor, not finite where any is not. One wait for the device."""
    found = norms(tensors)
    return dict(zip(found, torch.stack([norm.float() for norm in found.values()]).tolist(), strict=True)) if found else {}


def not_finite(found: dict[str, float]) -> list[str]:
    """The names whose largest value is not a finite number."""
    return [name for name, value in found.items() if not abs(value) < float("inf")]


def listed(names: Sequence[str]) -> str:
    """Some of the names, for messages."""
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
