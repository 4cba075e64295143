"""Whether the engine holds what was trained: checksums of both, compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hybridflow.errors import WeightMismatchError, listed
from hybridflow.resharding.buckets import Plan
from hybridflow.resharding.checksum import Checksums

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Of weights as they travel."""
HeldWeights = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Place:
    """Which rank of which role an engine is on."""

    role: str
    rank: int
    is_sharded: bool = False
    """Whether its engine holds parts of tensors only."""


class Verifier:
    """One engine rank's check of each sync.

    A weight that the engine can show is compared as the engine holds it; one that it cannot, as it arrived.
    """

    def __init__(self, plan: Plan, part: int, held: HeldWeights, *, device: torch.device, place: Place):
        """`held` is asked once: what an engine can show does not change."""
        self.place, dtype = place, DTYPES[plan.dtype]
        boxes = {entry.name: entry.boxes[part] for entry in plan.entries}
        self.numbers = torch.tensor([plan.boxes[name, box] for name, box in boxes.items()], device=device)
        """Where the trainer's list of checksums has those of this rank's part."""
        shapes = {name: box.shape for name, box in boxes.items()}
        shown = {name: tuple(tensor.shape) for name, tensor in held if tensor.dtype == dtype}
        self.names = tuple(shapes)
        self.readable = {name for name, shape in shapes.items() if shown.get(name) == shape}
        self.unreadable = tuple(name for name in shapes if name not in self.readable)
        """Weights that the engine cannot show as they were sent."""
        self.engine = Checksums([(name, shapes[name]) for name in shapes if name in self.readable], dtype=dtype, device=device)
        self.arrived = Checksums([(name, shapes[name]) for name in self.unreadable], dtype=dtype, device=device)

    def begin(self) -> None:
        """Before a sync."""
        self.engine.begin()
        self.arrived.begin()

    def show(self, name: str, tensor: torch.Tensor) -> bool:
        """This rank's part of a tensor on its way into the engine; whether it had to be looked at."""
        if name in self.readable:
            return False
        self.arrived.add(name, tensor)
        return True

    def compare(self, trained: torch.Tensor, held: HeldWeights) -> None:
        """Compare what was trained with what the engine holds now.

        `trained` are the trainer's checksums of `plan.boxes`: shape [boxes].

        Raises:
            WeightMismatchError: it names the tensors, and says whether they differed on arrival or in the engine.
        """
        self.engine.add_all([(name, tensor, 0) for name, tensor in held if name in self.readable])
        parts = [trained[self.numbers], self.arrived.finish(), self.engine.finish()]
        numbers = torch.cat(parts).tolist()  # the one copy to the host
        expected = dict(zip(self.names, numbers, strict=False))
        found = dict(zip([*self.arrived.names, *self.engine.names], numbers[len(expected) :], strict=True))
        bad = [name for name in self.names if found[name] != expected[name]]
        bad = list(dict.fromkeys([*self.arrived.unseen, *self.engine.unseen, *bad]))
        if bad:
            raise WeightMismatchError(self._message(bad))

    def _message(self, bad: list[str]) -> str:
        on_the_way = any(name not in self.readable for name in bad)
        where = "did not arrive as they were trained at" if on_the_way else "differ from what was trained in the engine of"
        return (
            f"after the weight sync {len(bad)} of {len(self.names)} tensors {where} {self.place.role} rank {self.place.rank}: "
            f"{listed(bad)}. Responses would come from other weights than those that learn. Look at the engine's load_weights "
            "for these names; rollout.verify_weights=false turns this check off"
        )
