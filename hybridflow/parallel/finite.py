"""Which tensors hold numbers that are not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.distributed.tensor import DTensor

MOST_NAMED = 3
NamedTensors = Iterable[tuple[str, torch.Tensor | None]]


@torch.no_grad()
def largest(tensors: NamedTensors) -> dict[str, float]:
    """The largest absolute value in this rank's share of each tensor, not finite where any is not. One wait for the device."""
    shares = {
        name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors if tensor is not None
    }
    shares = {name: share.detach() for name, share in shares.items() if share.numel()}
    if not shares:
        return {}
    norms = torch._foreach_norm(list(shares.values()), float("inf"))
    return dict(zip(shares, torch.stack([norm.float() for norm in norms]).tolist(), strict=True))


def not_finite(found: dict[str, float]) -> list[str]:
    """The names whose largest value is not a finite number."""
    return [name for name, value in found.items() if not abs(value) < float("inf")]


def listed(names: Sequence[str]) -> str:
    """Some of the names, for messages."""
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
