"""The engine's loading recorded and made again: with a recorder of the CPU, which like a CUDA graph holds copies back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow.errors import WeightMismatchError
from hybridflow.resharding.recorded import PLAIN_LOADS, Loads
from hybridflow.resharding.transfer import ColocatedSync, SyncSettings
from hybridflow.resharding.verify import Verifier
from tests.unit.test_resharding_sync import CUT, FakeEngine, TensorRank, settings, trained


class CopyRecording(TorchDispatchMode):
    """Holds back every `copy_` while it records; a value read on the host is an error, as with a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.copies.append((args[0], args[1]))
            return args[0]
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        return func(*args, **(kwargs or {}))

    def begin(self) -> None:
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)

    abort = end

    def replay(self) -> None:
        for target, source in self.copies:
            target.copy_(source)


class RecordedSync(ColocatedSync):
    def _prepare(self, tensors, target):
        plan = super()._prepare(tensors, target)
        self.loads = Loads(len(plan.buckets), CopyRecording)
        return plan


class CountingEngine(FakeEngine):
    """Counts what it was asked to do."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__(dtype)
        self.num_loads = self.num_forgotten = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.num_loads += 1
        super().load_weights(weights)

    def forget_prefixes(self) -> None:
        self.num_forgotten += 1


NUM_SYNCS = PLAIN_LOADS + 3
"""Plain ones, one that is recorded, and two that are replayed."""


def test_replayed_loads_bring_the_trained_weights_without_the_engines_own_loading():
    engine, sync = CountingEngine(), RecordedSync(settings("bfloat16"), group=None)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
        assert all(torch.equal(engine.weights[name], tensor.bfloat16()) for name, tensor in trained(seed)), seed
    assert (engine.num_loads, engine.num_forgotten) == (PLAIN_LOADS + 1, 2)
    assert sync.plan is not None and len(sync.plan.buckets) > 2, "buffers were used several times"


def test_windows_are_recorded_too():
    engine, sync = TensorRank(), RecordedSync(CUT, group=None)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
        assert torch.equal(engine.weights["down"], dict(trained(seed))["down"].bfloat16()[:, 8:])


def test_loads_are_recorded_anew_where_the_engines_weights_have_moved():
    engine, sync = CountingEngine(), RecordedSync(settings("bfloat16"), group=None)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
    engine.weights["q"] = torch.zeros_like(engine.weights["q"])
    for seed in range(3):
        sync.sync(trained(seed), engine)
        assert torch.equal(engine.weights["q"], dict(trained(seed))["q"].bfloat16())
    assert engine.num_loads == PLAIN_LOADS + 2


def test_an_engine_whose_loading_cannot_be_recorded_goes_on_as_before():
    class Asking(CountingEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            assert float(tensor.sum()) < 1e9
            super().take(name, tensor)

    engine, sync = Asking(), RecordedSync(settings("bfloat16"), group=None)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
        assert all(torch.equal(engine.weights[name], tensor.bfloat16()) for name, tensor in trained(seed)), seed
    assert engine.num_forgotten == 0


def test_an_error_of_the_engine_outside_of_a_recording_is_not_hidden():
    class Failing(CountingEngine):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            super().load_weights(weights)
            if self.num_loads > PLAIN_LOADS:
                raise RuntimeError("out of memory")

    engine, sync = Failing(), RecordedSync(settings("bfloat16"), group=None)
    for seed in range(PLAIN_LOADS):
        sync.sync(trained(seed), engine)
    with pytest.raises(RuntimeError, match="out of memory"):
        sync.sync(trained(9), engine)


def test_a_replay_that_misses_a_bucket_is_caught():
    engine, sync = CountingEngine(), RecordedSync(settings("bfloat16"), group=None)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
    sync.loads.replay = lambda bucket: None  # type: ignore[method-assign]
    with pytest.raises(WeightMismatchError, match="6 of 6"):
        sync.sync(trained(99), engine)


@pytest.mark.parametrize(
    ("device", "can_replay", "unreadable", "expected"),
    [
        ("cuda", True, False, True),
        ("cpu", True, False, False),
        ("cuda", False, False, False),
        ("cuda", True, True, False),
    ],
    ids=["on CUDA", "not on the CPU", "not where the engine cannot", "not where weights cannot be read back"],
)
def test_what_is_recorded(device: str, can_replay: bool, unreadable: bool, expected: bool):
    engine = FakeEngine(torch.bfloat16)
    sync = ColocatedSync(settings("bfloat16"), group=None)
    sync.sync(trained(), engine)
    plan = sync.plan
    assert plan is not None
    held = [pair for pair in engine.held_weights() if not unreadable or pair[0] != "q"]
    verifier = Verifier(plan, 0, held, device=torch.device("cpu"), place=CUT.place)
    on_device = SyncSettings(dtype="bfloat16", bucket_bytes=256, verify=True, device=torch.device(device), place=CUT.place)
    engine.can_replay_loads = can_replay
    assert on_device.loads(plan, verifier, engine).can_record == expected
