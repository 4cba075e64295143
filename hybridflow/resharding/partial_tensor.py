"""Tensors of which a rank has only the part that its engine reads.

Engines take whole tensors and shard them themselves. What they read is found out once, by a dry-run load on tensors that take
no memory; from then on only that part is sent, in a `PartialTensor` that has the shape of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from hybridflow.errors import EngineError
from hybridflow.resharding.buckets import Part
from hybridflow.resharding.layout import Box

_SLICE = torch.ops.aten.slice.Tensor
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class PartialTensor(torch.Tensor):
    """A tensor of any shape with the elements of one box of it. A slice within the box is an ordinary tensor."""

    held: torch.Tensor
    box: Box
    weight: str
    """Its name."""
    reads: list[Box]
    """Boxes that were read."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, shape: tuple[int, ...], box: Box, *, weight: str, reads: list[Box]) -> PartialTensor:
        """`held` has the shape of `box`, which lies in a tensor of `shape`."""
        partial: PartialTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=held.dtype, device=held.device)
        partial.held, partial.box, partial.weight, partial.reads = held, box, weight, reads
        return partial

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the type of its disabled default
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Slices give the part; copies give another partial tensor; whatever else needs the whole."""
        kwargs = kwargs or {}
        if func is _SLICE:
            return args[0].read(*args[1:], **kwargs)
        if func in _COPIES:
            return args[0].over(func(args[0].held, *args[1:], **kwargs))
        return func(
            *tree_map_only(PartialTensor, PartialTensor.whole, args),
            **tree_map_only(PartialTensor, PartialTensor.whole, kwargs),
        )

    def over(self, held: torch.Tensor) -> PartialTensor:
        """A partial tensor with the same box."""
        return PartialTensor(held, tuple(self.shape), self.box, weight=self.weight, reads=self.reads)

    def read(self, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> torch.Tensor:
        """As aten.slice.

        Raises:
            EngineError: it is not within the box.
        """
        dim %= self.dim()
        low, high, step = slice(start, stop, step).indices(self.shape[dim])
        if (low, high, step) == (0, self.shape[dim], 1):
            return self.over(self.held)
        if low >= high:  # of a vocabulary smaller than its padding, a rank has nothing
            return self.held.narrow(dim, 0, 0)
        wanted = Box.whole(tuple(self.shape)).between(dim, low, high)
        if step != 1 or self.box.intersect(wanted) != wanted:
            raise self._outside(f"[{low}:{high}:{step}] along dim {dim}")
        self.reads.append(wanted)
        return self.held.narrow(dim, low - self.box.start[dim], high - low)

    def whole(self) -> torch.Tensor:
        """The tensor, where the box is all of it.

        Raises:
            EngineError: the box is a part.
        """
        if self.box != Box.whole(tuple(self.shape)):
            raise self._outside("everything")
        self.reads.append(self.box)
        return self.held

    def _outside(self, wanted: str) -> EngineError:
        return EngineError(
            f"while loading weights the engine read {wanted} of {self.weight} {tuple(self.shape)}, but in its dry-run load "
            f"only {self.box.start} to {self.box.stop}: what an engine reads of a tensor must not change from load to load"
        )


def dry_run_load(
    load_weights: Callable[[Iterable[tuple[str, torch.Tensor]]], None],
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Part:
    """What an engine reads of tensors of `shapes`. It loads zeros: weights must follow.

    A tensor that is read in several places or in another way than by a slice, or not at all, counts as read whole.
    """
    reads: dict[str, list[Box]] = {name: [] for name, _ in shapes}
    zero = torch.zeros((), dtype=dtype, device=device)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes:
            yield name, PartialTensor(zero.expand(shape), shape, Box.whole(shape), weight=name, reads=reads[name])

    load_weights(tensors())
    return {
        name: boxes[0]
        for (name, shape), boxes in zip(shapes, reads.values(), strict=True)
        if len(set(boxes)) == 1 and boxes[0] != Box.whole(shape)
    }
