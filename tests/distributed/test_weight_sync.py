"""Weights of several trainer ranks to engines on the same ranks, and on ranks of another pool, over gloo."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hybridflow.config.schema import Config, DataConfig, ModelConfig, PlacementConfig, RolloutConfig
from hybridflow.errors import WeightMismatchError
from hybridflow.resharding.layout import Box
from hybridflow.resharding.links import host_transfer, join_transfer
from hybridflow.resharding.pack import NamedTensors
from hybridflow.resharding.transfer import ColocatedSync, SyncReport, SyncSettings, WeightReceiver, WeightSender
from hybridflow.resharding.verify import Place
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker
from tests.distributed.ranks import start
from tests.reference.reshard_schedule import schedule
from tests.reference.weight_layouts import FsdpLayout, GenerationLayout, TensorSpec, TrainingLayout, chunk_box
from tests.toy import make_tiny_model

CPU = torch.device("cpu")
EVEN = {"embed": (96, 16), "q": (48, 48), "norm": (96,), "down": (48, 96)}
"""Cut without padding by 2, 3 and 4 ranks: chunks are multiples of 16 bytes."""
UNEVEN = {"embed": (7, 5), "scale": (1,), "bias": (3,), "q": (8, 8), "conv": (5, 3, 2), "large": (131, 9)}
"""Short and empty chunks, rows of odd bytes, and a tensor larger than a bucket."""


class FakeEngine:
    """Copies what it is given; `forgets` names a tensor that it does not."""

    can_replay_loads = True

    def __init__(self, shapes: dict[str, tuple[int, ...]], *, forgets: str = ""):
        self.weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        self.forgets = forgets

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            if name != self.forgets:
                self.weights[name].copy_(tensor)

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.weights.items())

    def reset_prefix_cache(self) -> None:
        pass


class TensorParallelEngine(FakeEngine):
    """One of two tensor ranks: a half of the rows of q, of the columns of down, of the vocabulary; and it may be wrong."""

    DIMS: ClassVar[dict[str, int]] = {"q": 0, "down": 1, "embed": 0}

    def __init__(self, shapes: dict[str, tuple[int, ...]], tensor_rank: int, *, doubles: str = ""):
        super().__init__(shapes)
        self.tensor_rank, self.doubles = tensor_rank, doubles
        for name in self.DIMS:
            self.weights[name] = self.part(name, self.weights[name]).clone()

    def part(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        dim = self.DIMS.get(name)
        if dim is None:
            return tensor
        first = -(-tensor.shape[dim] // 2)
        return tensor.narrow(dim, 0, first) if self.tensor_rank == 0 else tensor.narrow(dim, first, tensor.shape[dim] - first)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights((name, self.part(name, tensor)) for name, tensor in weights)
        if self.doubles:
            self.weights[self.doubles].mul_(2)


def whole_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sharded(tensors: dict[str, torch.Tensor], num_ranks: int) -> list[tuple[str, torch.Tensor]]:
    mesh = init_device_mesh("cpu", (num_ranks,))
    return [(name, distribute_tensor(tensor, mesh, [Shard(0)])) for name, tensor in tensors.items()]


def settings(rank: int, *, is_sharded: bool = False) -> SyncSettings:
    place = Place("rollout", rank, is_sharded=is_sharded)
    return SyncSettings(dtype="bfloat16", bucket_bytes=2048, verify=True, device=CPU, place=place)


def assert_holds(engine: FakeEngine, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        assert torch.equal(engine.weights[name], tensor.bfloat16()), name


def on_ranks(num_ranks: int, function: Callable[[int, int], None], folder: Path) -> None:
    """Run `function(rank, num_ranks)` in processes that share a gloo group."""
    start(num_ranks, _on_rank, num_ranks, str(folder / "meet"), function)


def _on_rank(rank: int, num_ranks: int, meeting_point: str, function: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=num_ranks)
    function(rank, num_ranks)
    dist.barrier()
    dist.destroy_process_group()


def synced(
    settings: SyncSettings, tensors: NamedTensors, engine: FakeEngine, kind: type[ColocatedSync] = ColocatedSync
) -> SyncReport:
    """The first sync of all ranks."""
    return kind(settings, dist.group.WORLD, tensors, engine).sync(tensors, engine)


def sync_uneven_twice(rank: int, num_ranks: int) -> None:
    engine = FakeEngine(UNEVEN)
    sync = ColocatedSync(settings(rank), dist.group.WORLD, sharded(whole_tensors(UNEVEN, 0), num_ranks), engine)
    for seed in (0, 1):
        tensors = whole_tensors(UNEVEN, seed)
        sync.sync(sharded(tensors, num_ranks), engine)
        assert_holds(engine, tensors)


def sync_even_and_count(rank: int, num_ranks: int) -> None:
    engine, tensors = FakeEngine(EVEN), whole_tensors(EVEN, 0)
    report = synced(settings(rank), sharded(tensors, num_ranks), engine)
    assert_holds(engine, tensors)
    specs = [TensorSpec(name, shape, itemsize=2) for name, shape in EVEN.items()]
    generation = GenerationLayout(training=TrainingLayout(tensor=num_ranks))
    assert report.bytes_received == schedule(FsdpLayout(num_ranks=num_ranks), generation, specs).bytes_received(rank)


def sync_with_a_forgetful_second_rank(rank: int, num_ranks: int) -> None:
    engine = FakeEngine(UNEVEN, forgets="q" if rank == 1 else "")
    tensors = sharded(whole_tensors(UNEVEN, 0), num_ranks)
    sync = ColocatedSync(settings(rank), dist.group.WORLD, tensors, engine)
    if rank != 1:
        sync.sync(tensors, engine)
        return
    with pytest.raises(WeightMismatchError, match=r"1 of 6 tensors differ .* rollout rank 1: q\."):
        sync.sync(tensors, engine)


class Hidden(FakeEngine):
    """Cannot show one of its weights."""

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor) for name, tensor in super().named_parameters() if name != "q")


def sync_with_a_second_rank_that_hides_a_weight(rank: int, num_ranks: int) -> None:
    engine = (Hidden if rank == 1 else FakeEngine)(UNEVEN)
    sync = ColocatedSync(settings(rank), dist.group.WORLD, sharded(whole_tensors(UNEVEN, 0), num_ranks), engine)
    for seed in (0, 1):
        tensors = whole_tensors(UNEVEN, seed)
        assert sync.sync(sharded(tensors, num_ranks), engine).unreadable == ("q",), "all ranks probe, or none"
        assert_holds(engine, tensors)


class Halves:
    """The layout of tensor-parallel engines on `num_ranks` ranks; the tensor rank of each is `tensor_rank_of[rank]`."""

    def __init__(self, tensor_rank_of: list[int]):
        self.tensor_rank_of = tensor_rank_of

    @property
    def ranks(self) -> range:
        return range(len(self.tensor_rank_of))

    def box(self, tensor: TensorSpec, rank: int) -> Box | None:
        dim = TensorParallelEngine.DIMS.get(tensor.name)
        whole = Box.whole(tensor.shape)
        return whole if dim is None else chunk_box(whole, dim, 2, self.tensor_rank_of[rank])

    def replica(self, rank: int) -> int:
        return rank


def sync_to_tensor_parallel_engines(rank: int, num_ranks: int, *, tensor_rank_of: list[int]) -> None:
    engine, of_tensor_ranks = TensorParallelEngine(EVEN, tensor_rank_of[rank]), settings(rank, is_sharded=True)
    sync = ColocatedSync(of_tensor_ranks, dist.group.WORLD, sharded(whole_tensors(EVEN, 0), num_ranks), engine)
    for seed in (0, 1):
        tensors = whole_tensors(EVEN, seed)
        report = sync.sync(sharded(tensors, num_ranks), engine)
        assert_holds(engine, {name: engine.part(name, tensor) for name, tensor in tensors.items()})
        assert report.unreadable == ()
        specs = [TensorSpec(name, shape, itemsize=2) for name, shape in EVEN.items()]
        predicted = schedule(FsdpLayout(num_ranks=num_ranks), Halves(tensor_rank_of), specs).bytes_received(rank)
        assert report.bytes_received == report.bytes_missing == predicted
    wrong = TensorParallelEngine(EVEN, tensor_rank_of[rank], doubles="down")
    with pytest.raises(WeightMismatchError, match=r"1 of 4 tensors differ .*: down"):
        synced(of_tensor_ranks, sharded(tensors, num_ranks), wrong)


def sync_uneven_to_tensor_parallel_engines(rank: int, num_ranks: int) -> None:
    shapes = UNEVEN | {"down": (3, 11)}
    engine, first = TensorParallelEngine(shapes, rank % 2), sharded(whole_tensors(shapes, 0), num_ranks)
    sync = ColocatedSync(settings(rank, is_sharded=True), dist.group.WORLD, first, engine)
    for seed in (0, 1):
        tensors = whole_tensors(shapes, seed)
        sync.sync(sharded(tensors, num_ranks), engine)
        assert_holds(engine, {name: engine.part(name, tensor) for name, tensor in tensors.items()})


def sync_what_a_rank_altered_on_the_way(rank: int, num_ranks: int) -> None:
    """Rank 1 sends other rows of `large` than it trains: every rank must notice."""

    class Altering(ColocatedSync):
        def _start(self, bucket, tensors, timeline):
            pack = self.packer.pack

            def pack_then_alter(bucket, tensors, timeline):
                pack(bucket, tensors, timeline)
                if rank == 1 and self.plan.buckets[bucket][0].name == "large":
                    self.assembler.received[bucket][1].mul_(2)

            self.packer.pack = pack_then_alter
            try:
                return super()._start(bucket, tensors, timeline)
            finally:
                self.packer.pack = pack

    with pytest.raises(WeightMismatchError, match=rf"1 of 6 tensors .* rollout rank {rank}: large"):
        synced(settings(rank), sharded(whole_tensors(UNEVEN, 0), num_ranks), FakeEngine(UNEVEN), kind=Altering)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_uneven_shards_arrive_whole_on_every_rank(tmp_path: Path, num_ranks: int):
    on_ranks(num_ranks, sync_uneven_twice, tmp_path)


def test_bytes_received_are_those_of_the_schedule(tmp_path: Path):
    on_ranks(2, sync_even_and_count, tmp_path)


def test_a_mismatch_names_tensor_and_rank_on_the_rank_that_has_it(tmp_path: Path):
    on_ranks(2, sync_with_a_forgetful_second_rank, tmp_path)


def test_all_ranks_know_what_one_cannot_show(tmp_path: Path):
    on_ranks(2, sync_with_a_second_rank_that_hides_a_weight, tmp_path)


@pytest.mark.parametrize(
    "tensor_rank_of", [[0, 1], [0, 1, 0, 1], [0, 0, 1, 1]], ids=["one engine", "consecutive groups", "groups at interval 2"]
)
def test_tensor_parallel_engines_receive_what_the_schedule_lists_and_hold_their_parts(
    tmp_path: Path, tensor_rank_of: list[int]
):
    on_ranks(len(tensor_rank_of), partial(sync_to_tensor_parallel_engines, tensor_rank_of=tensor_rank_of), tmp_path)


def test_uneven_shards_arrive_at_tensor_parallel_engines(tmp_path: Path):
    on_ranks(3, sync_uneven_to_tensor_parallel_engines, tmp_path)


def test_weights_altered_on_the_way_are_noticed_on_every_rank(tmp_path: Path):
    on_ranks(2, sync_what_a_rank_altered_on_the_way, tmp_path)


def sync_workers(rank: int, num_ranks: int, *, model: str, engine: str = "torch", tensor_parallel: int = 1) -> None:
    """Real workers: an actor and engines, both cut over the ranks. The probe compares log-probabilities."""
    config = Config(
        model=ModelConfig(path=model),
        data=DataConfig(max_prompt_tokens=400, max_response_tokens=100),
        rollout=RolloutConfig(
            engine=engine, tensor_parallel=tensor_parallel, max_num_seqs=4, cpu_cache_gib=0.1, sync_bucket_mib=1
        ),
        placement=PlacementConfig(pools={"main": f"1x{num_ranks}"}),
    )
    roles: dict[str, Worker] = {}
    for role, kind in (("actor", ActorWorker), ("rollout", RolloutWorker)):
        layout = kind.layout_of(config, num_ranks)
        context = RankContext(role=role, rank=rank, layout=layout, device=CPU, group=dist.group.WORLD, peers=roles)
        roles[role] = kind(config, context)
    actor, rollout = roles["actor"], roles["rollout"]
    assert isinstance(actor, ActorWorker) and isinstance(rollout, RolloutWorker)
    for _ in range(2):
        for _, tensor in actor.named_tensors():
            assert isinstance(tensor, DTensor)
            tensor.detach().to_local().mul_(1.1)
        metrics = rollout.sync_weights()
        assert rollout.weight_sync.probe_difference is not None and rollout.weight_sync.probe_difference < 1e-4
        assert metrics["sync/tensors_unreadable"] == 0
        weight_bytes = sum(tensor.numel() * 4 for _, tensor in actor.named_tensors())
        others = (num_ranks - 1) / num_ranks
        assert metrics["sync/bytes_received"] == metrics["sync/bytes_missing"] <= others * weight_bytes
        assert tensor_parallel == 1 or metrics["sync/bytes_received"] < 0.75 * others * weight_bytes
    rollout.close()


def test_engines_agree_with_an_actor_that_is_cut_over_two_ranks(tmp_path: Path, tiny_model: str):
    on_ranks(2, partial(sync_workers, model=tiny_model), tmp_path)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT RUN: vLLM is not installed")
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_vllm_engines_cut_in_two_agree_with_an_actor_that_is_cut_over_all_ranks(tmp_path: Path, num_ranks: int):
    model = make_tiny_model(tmp_path / "model", hidden_size=128)
    on_ranks(num_ranks, partial(sync_workers, model=str(model), engine="vllm", tensor_parallel=2), tmp_path)


NUM_SYNCS = 3
SENT = UNEVEN | {"down": (3, 11)}


def _train(rank: int, num_trainers: int, folder: str) -> None:
    """A trainer rank: sends weights of seeds 0, 1, 2."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/trainers", rank=rank, world_size=num_trainers)
    address = Path(folder, "address")
    if rank == 0:
        store, own_address = host_transfer(device=CPU, timeout_s=60)
        address.with_suffix(".tmp").write_text(own_address)
        address.with_suffix(".tmp").rename(address)
    else:
        store = join_transfer(_wait_for(address), device=CPU, timeout_s=60)
    first = sharded(whole_tensors(SENT, 0), num_trainers)
    sender = WeightSender(settings(rank), store, first, rank=rank, num_ranks=num_trainers)
    for seed in range(NUM_SYNCS):
        sender.send(sharded(whole_tensors(SENT, seed), num_trainers))
    _wait_for(Path(folder, "received"))  # the rendezvous lives here
    dist.barrier()
    dist.destroy_process_group()


def _generate(rank: int, num_receivers: int, folder: str) -> None:
    """A rollout rank, which knows nothing of the weights beforehand; the last sync meets a forgetful engine."""
    store = join_transfer(_wait_for(Path(folder, "address")), device=CPU, timeout_s=60)
    is_sharded = num_receivers > 2  # two engines of two tensor ranks
    engine = TensorParallelEngine(SENT, rank % 2) if is_sharded else FakeEngine(SENT)
    receiver = WeightReceiver(settings(rank, is_sharded=is_sharded), store, engine, rank=rank, num_ranks=num_receivers)
    for seed in range(NUM_SYNCS - 1):
        report = receiver.receive(engine)
        expected = whole_tensors(SENT, seed)
        parts = {name: engine.part(name, tensor) for name, tensor in expected.items()} if is_sharded else expected
        assert_holds(engine, parts)
        assert report.bytes_missing == sum(tensor.numel() * 2 for tensor in parts.values())
        # Over it by at most 14 bytes of alignment for each block of each of up to three senders.
        assert 0 <= report.bytes_received - report.bytes_missing <= 14 * 3 * len(SENT)
    engine.forgets = "conv"
    with pytest.raises(WeightMismatchError, match=rf"1 of 7 tensors differ .* rollout rank {rank}: conv"):
        receiver.receive(engine)
    if rank == 0:
        Path(folder, "received").write_text("done")


def _wait_for(path: Path, timeout_s: float = 60) -> str:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)
    return path.read_text()


def _trainer_or_receiver(rank: int, num_trainers: int, num_receivers: int, folder: str) -> None:
    torch.set_num_threads(1)
    if rank < num_trainers:
        _train(rank, num_trainers, folder)
    else:
        _generate(rank - num_trainers, num_receivers, folder)


@pytest.mark.parametrize(("num_trainers", "num_receivers"), [(1, 1), (2, 2), (2, 4)])
def test_weights_reach_the_engines_of_another_pool(tmp_path: Path, num_trainers: int, num_receivers: int):
    start(num_trainers + num_receivers, _trainer_or_receiver, num_trainers, num_receivers, str(tmp_path))
