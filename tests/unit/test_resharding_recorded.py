"""The engine's loading recorded and made again: with a recorder of the CPU, which like a CUDA graph holds copies back."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow.errors import WeightMismatchError
from hybridflow.resharding.recorded import Loads
from hybridflow.resharding.transfer import ColocatedSync, SyncSettings
from hybridflow.resharding.verify import Verifier
from tests.unit.test_resharding_sync import CUT, FakeEngine, TensorRank, settings, synced, trained


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
    def __init__(self, settings, engine):
        super().__init__(settings, None, trained(), engine)
        self.loads = Loads(len(self.plan.buckets), CopyRecording)


class CountingEngine(FakeEngine):
    """Counts what it was asked to do."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__(dtype)
        self.num_loads = self.num_forgotten = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.num_loads += 1
        super().load_weights(weights)

    def reset_prefix_cache(self) -> None:
        self.num_forgotten += 1


NUM_SYNCS = 4
"""One that is watched, one that is recorded, and two that are replayed."""


def test_replayed_loads_bring_the_trained_weights_without_the_engines_own_loading():
    engine = CountingEngine()
    sync = RecordedSync(settings("bfloat16"), engine)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
        assert all(torch.equal(engine.weights[name], tensor.bfloat16()) for name, tensor in trained(seed)), seed
    assert (engine.num_loads, engine.num_forgotten) == (2, 2)
    assert len(sync.plan.buckets) > 2, "buffers were used several times"


def test_windows_are_recorded_too():
    engine = TensorRank()
    sync = RecordedSync(CUT, engine)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
        assert torch.equal(engine.weights["down"], dict(trained(seed))["down"].bfloat16()[:, 8:])


def test_loads_are_recorded_anew_where_the_engines_weights_have_moved():
    engine = CountingEngine()
    sync = RecordedSync(settings("bfloat16"), engine)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
    engine.weights["q"] = torch.zeros_like(engine.weights["q"])
    for seed in range(3):
        sync.sync(trained(seed), engine)
        assert torch.equal(engine.weights["q"], dict(trained(seed))["q"].bfloat16())
    assert engine.num_loads == 3


def reads_a_value(tensor: torch.Tensor) -> None:
    assert float(tensor.sum()) < 1e9


def looks_for_what_is_not_zero(tensor: torch.Tensor) -> None:
    tensor.nonzero()


def goes_to_another_device(tensor: torch.Tensor) -> None:
    tensor.to("meta")


@pytest.mark.parametrize("looks", [reads_a_value, looks_for_what_is_not_zero, goes_to_another_device])
def test_an_engine_whose_loading_does_more_than_launch_copies_is_never_recorded(looks: Callable[[torch.Tensor], None]):
    class Looking(CountingEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            looks(tensor)
            super().take(name, tensor)

    engine = Looking()
    sync = RecordedSync(settings("bfloat16"), engine)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
        assert all(torch.equal(engine.weights[name], tensor.bfloat16()) for name, tensor in trained(seed)), seed
    assert sync.loads.new_recording is None
    assert (engine.num_loads, engine.num_forgotten) == (NUM_SYNCS, 0)


@pytest.mark.parametrize("fails_at", ["embed", "down", "odd"])
def test_an_error_while_recording_is_raised_and_what_was_recorded_before_it_is_forgotten(fails_at: str):
    class Failing(CountingEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            if self.num_loads == 2 and name == fails_at:
                raise KeyError(name)
            super().take(name, tensor)

    engine = Failing()
    sync = RecordedSync(settings("bfloat16"), engine)
    sync.sync(trained(0), engine)
    with pytest.raises(KeyError, match=fails_at):
        sync.sync(trained(1), engine)
    changed = torch.zeros(3)
    changed.copy_(torch.ones(3))
    assert changed.tolist() == [1.0] * 3, "copies are made again"
    for seed in (2, 3):  # one that is recorded anew, one that is replayed
        sync.sync(trained(seed), engine)
        assert all(torch.equal(engine.weights[name], tensor.bfloat16()) for name, tensor in trained(seed)), seed
    assert engine.num_loads == 3


FORGETS_S = 0.05


class SlowToForget(CountingEngine):
    """Takes its time to forget prefixes, as the last thing of each load and when asked."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(weights)
        time.sleep(FORGETS_S)

    def reset_prefix_cache(self) -> None:
        time.sleep(FORGETS_S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["as they are", "in buckets"])
def test_forgetting_prefixes_is_a_part_of_its_own_where_the_engine_only_launches_copies(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    engine, name = SlowToForget(dtype), str(dtype).removeprefix("torch.")
    on_cpu = synced(settings(name), trained(), engine)
    assert "reset" not in on_cpu.seconds and on_cpu.seconds["load"] >= FORGETS_S, "it may have packed weights meanwhile"
    monkeypatch.setattr(SyncSettings, "only_launches", lambda self, target: target.can_replay_loads)
    report = synced(settings(name), trained(), engine)
    assert report.seconds["reset"] >= FORGETS_S > report.seconds["load"]


def test_forgetting_prefixes_after_a_replay_is_a_part_of_its_own():
    engine = SlowToForget()
    sync = RecordedSync(settings("bfloat16"), engine)
    report = [sync.sync(trained(seed), engine) for seed in range(NUM_SYNCS)][-1]
    assert report.seconds["reset"] >= FORGETS_S > report.seconds["load"]


def test_a_replay_that_misses_a_bucket_is_caught():
    engine = CountingEngine()
    sync = RecordedSync(settings("bfloat16"), engine)
    for seed in range(NUM_SYNCS):
        sync.sync(trained(seed), engine)
    sync.loads.recordings = [SimpleNamespace(replay=lambda: None) for _ in sync.loads.recordings]
    with pytest.raises(WeightMismatchError, match="6 of 6"):
        sync.sync(trained(99), engine)


@pytest.mark.parametrize(
    ("device", "can_replay", "unreadable", "num_shards", "expected"),
    [
        ("cuda", True, False, 1, True),
        ("cpu", True, False, 1, False),
        ("cuda", False, False, 1, False),
        ("cuda", True, True, 1, False),
        ("cuda", True, False, 2, False),
    ],
    ids=["on CUDA", "no CPU", "no engine that cannot", "no weights that cannot be read back", "not while others wait"],
)
def test_what_is_recorded(device: str, can_replay: bool, unreadable: bool, num_shards: int, expected: bool):
    engine = FakeEngine(torch.bfloat16)
    sync = ColocatedSync(settings("bfloat16"), None, trained(), engine)
    sync.sync(trained(), engine)
    plan = dataclasses.replace(sync.plan, num_shards=num_shards)
    held = [pair for pair in engine.named_parameters() if not unreadable or pair[0] != "q"]
    verifier = Verifier(plan, 0, held, device=torch.device("cpu"), place=CUT.place)
    on_device = SyncSettings(dtype="bfloat16", bucket_bytes=256, verify=True, device=torch.device(device), place=CUT.place)
    engine.can_replay_loads = can_replay
    assert (on_device.loads(plan, verifier, engine).new_recording is not None) == expected
