"""A whole sync in one process: what the engine is given, and what the check afterwards notices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from hybridflow.errors import WeightMismatchError
from hybridflow.resharding.transfer import ColocatedSync, SyncReport, SyncSettings
from hybridflow.resharding.verify import Place

CPU = torch.device("cpu")
SHAPES = {"embed": (20, 8), "q": (8, 8), "norm": (8,), "bias": (3,), "down": (8, 16), "odd": (5, 7)}


class FakeEngine:
    """Copies what it is given, like every engine; subclasses do it wrong."""

    can_replay_loads = True

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.weights = {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.take(name, tensor)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        self.weights[name].copy_(tensor)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights.items())

    def reset_prefix_cache(self) -> None:
        pass


def trained(seed: int = 0) -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(name, torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()]


def settings(dtype: str = "float32", *, verify: bool = True, bucket_bytes: int = 256) -> SyncSettings:
    return SyncSettings(dtype=dtype, bucket_bytes=bucket_bytes, verify=verify, device=CPU, place=Place("rollout", 0))


def synced(how: SyncSettings, tensors: list[tuple[str, torch.Tensor]], engine: FakeEngine) -> SyncReport:
    """A first sync."""
    return ColocatedSync(how, None, tensors, engine).sync(tensors, engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_ends_with_the_trained_weights_in_its_dtype(dtype: str):
    engine = FakeEngine(getattr(torch, dtype))
    sync = ColocatedSync(settings(dtype), None, trained(), engine)
    for seed in (0, 1):
        tensors = trained(seed)
        report = sync.sync(tensors, engine)
        assert all(torch.equal(engine.weights[name], tensor.to(getattr(torch, dtype))) for name, tensor in tensors)
        assert (report.bytes_received, report.unreadable) == (0, ())


def test_the_engine_does_not_share_memory_with_the_trainer():
    engine, tensors = FakeEngine(), trained()
    synced(settings(), tensors, engine)
    before = engine.weights["q"].clone()
    dict(tensors)["q"].add_(1.0)
    assert torch.equal(engine.weights["q"], before)


def test_trained_tensors_are_left_alone():
    tensors = trained()
    before = [tensor.clone() for _, tensor in tensors]
    synced(settings("bfloat16"), tensors, FakeEngine(torch.bfloat16))
    assert all(torch.equal(tensor, old) for (_, tensor), old in zip(tensors, before, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_skipped_tensor_is_caught(dtype: str):
    class Forgetful(FakeEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            if name != "down":
                super().take(name, tensor)

    with pytest.raises(WeightMismatchError, match=r"1 of 6 tensors differ .* rollout rank 0: down"):
        synced(settings(dtype), trained(), Forgetful(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_transposed_square_tensor_is_caught(dtype: str):
    class Transposing(FakeEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            super().take(name, tensor.T if name == "q" else tensor)

    with pytest.raises(WeightMismatchError, match="rank 0: q"):
        synced(settings(dtype), trained(), Transposing(getattr(torch, dtype)))


def test_a_skipped_bucket_is_caught():
    class SkippingSecond(ColocatedSync):
        def _start(self, bucket, tensors, timeline):
            under_way = super()._start(bucket, tensors, timeline)
            if bucket == 1:
                self.assembler.received[bucket][0].zero_()
            return under_way

    engine = FakeEngine(torch.bfloat16)
    sync = SkippingSecond(settings("bfloat16"), None, trained(), engine)
    with pytest.raises(WeightMismatchError) as caught:
        sync.sync(trained(), engine)
    assert all(entry.name in str(caught.value) for entry in sync.plan.buckets[1])


def test_weights_left_from_the_last_sync_are_caught():
    class Frozen(FakeEngine):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            if not any(tensor.any() for tensor in self.weights.values()):
                super().load_weights(weights)

    engine = Frozen()
    sync = ColocatedSync(settings(), None, trained(), engine)
    sync.sync(trained(0), engine)
    with pytest.raises(WeightMismatchError, match="6 of 6"):
        sync.sync(trained(1), engine)


def test_the_check_can_be_turned_off():
    class Forgetful(FakeEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            pass

    report = synced(settings(verify=False), trained(), Forgetful())
    assert "checksum" not in report.seconds
    assert report.unreadable == ()


def test_weights_that_an_engine_cannot_show_are_reported():
    class Repacking(FakeEngine):
        def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor) for name, tensor in self.weights.items() if name != "q")

    report = synced(settings(), trained(), Repacking())
    assert report.unreadable == ("q",)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_never_asks_for_a_tensor_it_cannot_show_is_caught(dtype: str):
    class Impatient(FakeEngine):
        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in weights:
                self.take(name, tensor)
                if name == "down":
                    break  # "odd" comes after it

        def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((name, tensor) for name, tensor in self.weights.items() if name != "odd")

    with pytest.raises(WeightMismatchError, match=r"did not arrive .* odd"):
        synced(settings(dtype), trained(), Impatient(getattr(torch, dtype)))


class TensorRank(FakeEngine):
    """Tensor rank 1 of 2: holds the second half of rows of q and the second half of columns of down."""

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)
        self.weights["q"] = torch.zeros(4, 8, dtype=torch.bfloat16)
        self.weights["down"] = torch.zeros(8, 8, dtype=torch.bfloat16)

    def take(self, name: str, tensor: torch.Tensor) -> None:
        dim = {"q": 0, "down": 1}.get(name)
        held = self.weights[name]
        held.copy_(tensor if dim is None else tensor.narrow(dim, held.shape[dim], held.shape[dim]))


CUT = SyncSettings(dtype="bfloat16", bucket_bytes=256, verify=True, device=CPU, place=Place("rollout", 3, is_sharded=True))


def test_an_engine_that_cuts_weights_is_given_its_part_and_compared_by_it():
    engine = TensorRank()
    report = synced(CUT, trained(), engine)
    assert report.unreadable == ()
    assert torch.equal(engine.weights["down"], dict(trained())["down"].bfloat16()[:, 8:])

    class Wrong(TensorRank):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            super().take(name, tensor)
            if name in ("q", "down"):
                self.weights[name].mul_(2)

    with pytest.raises(WeightMismatchError, match=r"2 of 6 tensors differ .* rollout rank 3: q, down"):
        synced(CUT, trained(), Wrong())


def test_buckets_are_handed_out_one_ahead():
    # The bucket after the one that the engine is loading is under way already, and never two.
    order: list[str] = []

    class Watching(ColocatedSync):
        def _start(self, bucket, tensors, timeline):
            order.append(f"start {bucket}")
            return super()._start(bucket, tensors, timeline)

    class Noting(FakeEngine):
        def take(self, name: str, tensor: torch.Tensor) -> None:
            order.append(name)

    # 160-byte buckets of bfloat16: embed alone (320), q (128) + norm (16) + bias (6, padded to 16), down (256), odd (70).
    engine = Noting(torch.bfloat16)
    Watching(settings("bfloat16", verify=False, bucket_bytes=160), None, trained(), engine).sync(trained(), engine)
    assert order == [
        "start 0", "start 1", "embed",
        "start 2", "q", "norm", "bias",
        "start 3", "down",
        "odd",
    ]  # fmt: skip
