"""Weight sync alone: trained FSDP2 shards to the engine's weights, without Ray and without a training step.

    python -m benchmarks.reshard --shape 0.5b --engine vllm --syncs 20
    torchrun --nproc-per-node 4 -m benchmarks.reshard --shape 7b --engine vllm --tensor-parallel 2
    torchrun --nproc-per-node 2 -m benchmarks.reshard --shape 0.5b --engine vllm --trainers 1
    python -m benchmarks.reshard --shape tiny --engine torch --device cpu

All ranks train and generate, as on one pool; with `--trainers N` the first N train and the others generate, as on a pool each.

Prints medians of gather, transfer (between pools), load, cache reset and checksum, each where it occurs (docs/resharding.md,
Metrics), and writes them with every single sync to benchmarks/results/reshard_SHAPE_RANKS_tpTENSOR.json; RANKS is `1to1` for a
pool each. `sync/send_...` is the trainers' side of two pools. `seconds_reset_alone` is the engine's forgetting of prefixes once
more after each sync: what it takes where nothing hides it. The first two syncs warm up (and on one pool are followed by a
probe): they do not count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public; torch's stubs lag
from torch.distributed.rendezvous import rendezvous

from benchmarks.record import circumstances, command
from benchmarks.shapes import SHAPES, make_model
from hybridflow.config.schema import Config, ModelConfig, PlacementConfig, RolloutConfig
from hybridflow.parallel.mesh import init_process_group
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker

WARM_UP_SYNCS = 2
Sync = dict[str, float]
"""The metrics of a sync on one rank, and `seconds_...` of its caller."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process is among those of the benchmark."""

    rank: int
    """Within the pool."""
    pool: str
    pools: dict[str, int]
    """Ranks by pool: the actor's is the first, the engine's the last."""
    store: Store
    """Shared by all processes."""

    def meet(self, name: str) -> None:
        """Go on when every process has come here."""
        everyone = [f"{name}/{pool}/{rank}" for pool, num_ranks in self.pools.items() for rank in range(num_ranks)]
        self.store.set(f"{name}/{self.pool}/{self.rank}", "here")
        self.store.wait(everyone)


def place(num_trainers: int) -> Place:
    """From what torchrun has put into the environment; without it there is one process."""
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    address = f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29511')}"
    store, _, _ = next(rendezvous(address, rank, num_ranks))
    if not num_trainers:
        return Place(rank=rank, pool="main", pools={"main": num_ranks}, store=store)
    pools = {"train": num_trainers, "generate": num_ranks - num_trainers}
    if rank < num_trainers:
        return Place(rank=rank, pool="train", pools=pools, store=store)
    return Place(rank=rank - num_trainers, pool="generate", pools=pools, store=store)


def build(options: argparse.Namespace, own: Place) -> dict[str, Worker]:
    """The workers of this process by role, as on a rank of its pool."""
    device = (
        torch.device(options.device, int(os.environ.get("LOCAL_RANK", 0))) if options.device == "cuda" else torch.device("cpu")
    )
    num_ranks, store = own.pools[own.pool], PrefixStore(own.pool, own.store)
    init_process_group(rank=own.rank, world_size=num_ranks, rendezvous=store, device=device)
    folder, (actor_pool, *_), (*_, rollout_pool) = options.folder / options.shape, own.pools, own.pools
    if own.rank == 0 and own.pool == actor_pool:
        make_model(folder, SHAPES[options.shape])
    own.meet("model")
    config = Config(
        model=ModelConfig(path=str(folder / "model"), tokenizer=str(folder / "tokenizer")),
        rollout=RolloutConfig(
            engine=options.engine, tensor_parallel=options.tensor_parallel, gpu_memory_utilization=0.3, enforce_eager=True
        ),
        placement=PlacementConfig(
            pools={pool: f"1x{size}" for pool, size in own.pools.items()}, roles={"actor": actor_pool, "rollout": rollout_pool}
        ),
    )
    workers: dict[str, Worker] = {}
    classes: dict[str, type[Worker]] = {"actor": ActorWorker, "rollout": RolloutWorker}
    for role in (role for role, pool in config.placement.roles.items() if pool == own.pool):
        layout, group = classes[role].layout_of(config, num_ranks), torch.distributed.group.WORLD
        context = RankContext(role=role, rank=own.rank, layout=layout, device=device, group=group, peers=workers)
        workers[role] = classes[role](config, context)
    return workers


def measure(workers: dict[str, Worker], own: Place, num_syncs: int) -> list[Sync]:
    """Each sync on this rank."""
    actor, rollout = workers.get("actor"), workers.get("rollout")
    if len(own.pools) > 1:
        open_transfer(actor, rollout, own)
    measured = []
    for number in range(WARM_UP_SYNCS + num_syncs):
        own.meet(f"sync{number}")
        started = time.perf_counter()
        if isinstance(rollout, RolloutWorker):
            metrics = rollout.receive_weights() if actor is None else rollout.sync_weights()
            ended = time.perf_counter()
            with rollout.engine.paused() as engine:
                engine.reset_prefix_cache()
            measured.append({**metrics, "seconds_wall": ended - started, "seconds_reset_alone": time.perf_counter() - ended})
        else:
            assert isinstance(actor, ActorWorker)
            metrics = actor.send_weights()
            measured.append({**metrics, "seconds_send_wall": time.perf_counter() - started})
    own.meet("end")  # receivers read from the first trainer's store
    return measured


def open_transfer(actor: Worker | None, rollout: Worker | None, own: Place) -> None:
    """Have the two pools find each other."""
    worker = actor or rollout
    assert isinstance(worker, ActorWorker | RolloutWorker)
    if isinstance(worker, ActorWorker) and own.rank == 0:
        own.store.set("transfer", worker.transfer_address())
    worker.open_transfer(own.store.get("transfer").decode())


def of_all_pools(measured: list[Sync], own: Place) -> list[Sync]:
    """Each sync on the first ranks of both pools, whose metrics have different names."""
    if own.rank == 0:
        own.store.set(f"measured/{own.pool}", json.dumps(measured))
    own.meet("measured")
    by_pool: list[list[Sync]] = [json.loads(own.store.get(f"measured/{pool}")) for pool in own.pools]
    return [{name: value for part in parts for name, value in part.items()} for parts in zip(*by_pool, strict=True)]


def main() -> None:
    """Measure on every rank; the first ranks of the pools report their own numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--trainers", type=int, default=0)
    parser.add_argument("--syncs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    if not 0 <= options.trainers < (num_ranks := int(os.environ.get("WORLD_SIZE", 1))):
        parser.error(f"--trainers {options.trainers} leaves no rank of {num_ranks} to generate; start more with torchrun")
    own = place(options.trainers)
    workers = build(options, own)
    syncs = of_all_pools(measure(workers, own, options.syncs), own)
    if own.rank == 0 and "rollout" in workers:
        report(syncs, own, options)
    for worker in workers.values():
        worker.close()


def report(syncs: list[Sync], own: Place, options: argparse.Namespace) -> None:
    """Print medians, and write them and all syncs."""
    counted = syncs[WARM_UP_SYNCS:]
    medians = {name: statistics.median(sync.get(name, 0.0) for sync in counted) for name in sorted(counted[0])}
    for name, value in medians.items():
        print(f"{name:28} {value:,.5g}")
    result = {
        **circumstances(command("benchmarks.reshard", num_ranks=sum(own.pools.values())), options.device),
        "ranks": own.pools,
        "tensor_parallel": options.tensor_parallel,
        "medians": medians,
        "syncs": syncs,
    }
    ranks = "to".join(str(num_ranks) for num_ranks in own.pools.values())
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"reshard_{options.shape}_{ranks}_tp{options.tensor_parallel}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
