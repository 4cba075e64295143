"""Whether the engine holds what was trained: fingerprints of both, compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hybridflow.errors import WeightMismatchError
from hybridflow.resharding.buckets import Plan
from hybridflow.resharding.checksum import Fingerprints, Region, region_held

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Of weights as they travel."""
HeldWeights = Iterable[tuple[str, torch.Tensor]]
MOST_NAMED = 5
"""Tensors named in a message."""


@dataclass(frozen=True)
class Place:
    """Which rank of which role an engine is on."""

    role: str
    rank: int
    tensor_rank: int = 0
    num_tensor_ranks: int = 1


class Arrivals:
    """What reached this rank, as far as it cannot be read off the engine afterwards.

    A weight that the engine holds whole and readable needs no fingerprint on arrival: the engine's own is compared with
    the trainer's. Of a weight that the engine cuts, the arriving region is compared with the engine's part and the
    whole with the trainer's; of one that cannot be read back, only the latter.
    """

    def __init__(self, plan: Plan, device: torch.device, place: Place):
        self.shapes = {slot.name: slot.shape for slot in plan.slots}
        self.dtype, self.device, self.place = DTYPES[plan.dtype], device, place
        self.held_shapes: dict[str, tuple[int, ...]] = {}
        self.regions: dict[str, Region] = {}
        self.needed: set[str] = set()
        self.whole: Fingerprints | None = None
        self.cut: Fingerprints | None = None
        self.engine: Fingerprints | None = None

    def begin(self, held: HeldWeights) -> None:
        """Before a sync. `held` is read before the first one only: what an engine can show does not change."""
        if self.engine is None:
            self._arrange(
                {name: tuple(tensor.shape) for name, tensor in held if name in self.shapes and tensor.dtype == self.dtype}
            )
        for fingerprints in (self.whole, self.cut, self.engine):
            if fingerprints is not None:
                fingerprints.begin()

    def _arrange(self, held_shapes: dict[str, tuple[int, ...]]) -> None:
        self.held_shapes = held_shapes
        self.regions = {}
        for name, held in held_shapes.items():
            ranks = {"tensor_rank": self.place.tensor_rank, "num_tensor_ranks": self.place.num_tensor_ranks}
            if (region := region_held(self.shapes[name], held, **ranks)) is not None:
                self.regions[name] = region
        self.needed = {name for name in self.shapes if name in self.regions or name not in held_shapes}
        self.whole = self._fingerprints([(name, shape) for name, shape in self.shapes.items() if name in self.needed])
        self.cut = self._fingerprints([(name, held_shapes[name]) for name in self.regions])
        self.engine = self._fingerprints(list(held_shapes.items()))

    def _fingerprints(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Fingerprints:
        return Fingerprints(shapes, dtype=self.dtype, device=self.device)

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Weights that the engine cannot show."""
        return tuple(name for name in self.shapes if name not in self.held_shapes)

    def show(self, name: str, tensor: torch.Tensor) -> bool:
        """A full tensor on its way into the engine; whether it had to be looked at."""
        if self.whole is not None and name in self.needed:
            self.whole.add(name, tensor)
        if self.cut is not None and name in self.regions:
            self.cut.add(name, self.regions[name].of(tensor))
        return name in self.needed


def compare(trained: torch.Tensor, arrivals: Arrivals, held: HeldWeights, place: Place) -> None:
    """Compare what was trained with what the engine of this rank holds now.

    `trained` are the trainer's fingerprints of whole tensors, in the order of the plan: shape [tensors].

    Raises:
        WeightMismatchError: it names the tensors, and says whether they differed on arrival or in the engine only.
    """
    engine, whole, cut = arrivals.engine, arrivals.whole, arrivals.cut
    assert engine is not None and whole is not None and cut is not None, "begin comes before compare"
    engine.add_all([(name, tensor, 0) for name, tensor in held if name in arrivals.held_shapes])
    parts = [trained, whole.finish(), cut.finish(), engine.finish()]
    numbers = torch.cat(parts).tolist()  # the one copy to the host
    expected = dict(zip(arrivals.shapes, numbers, strict=False))
    arrived = dict(zip(whole.names, numbers[len(expected) :], strict=False))
    arrived_cut = dict(zip(cut.names, numbers[len(expected) + len(arrived) :], strict=False))
    held_now = dict(zip(engine.names, numbers[len(expected) + len(arrived) + len(arrived_cut) :], strict=True))
    changed = [name for name, number in arrived.items() if number != expected[name]]
    lost = [*whole.unseen, *engine.unseen]
    wrong = [name for name, number in held_now.items() if number != (expected | arrived_cut)[name]]
    if bad := list(dict.fromkeys([*lost, *changed, *wrong])):
        raise WeightMismatchError(_message(bad, place, on_the_way=bool(lost or changed), num_tensors=len(expected)))


def _message(bad: list[str], place: Place, *, on_the_way: bool, num_tensors: int) -> str:
    named = ", ".join(bad[:MOST_NAMED]) + (", ..." if len(bad) > MOST_NAMED else "")
    where = "did not arrive as they were trained at" if on_the_way else "differ from what was trained in the engine of"
    return (
        f"after the weight sync {len(bad)} of {num_tensors} tensors {where} {place.role} rank {place.rank}: {named}. "
        "Responses would come from other weights than those that learn. Look at the engine's load_weights for these names; "
        "rollout.verify_weights=false turns this check off"
    )
