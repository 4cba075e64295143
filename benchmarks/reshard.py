"""Weight sync alone: trained FSDP2 shards to the engine's weights, without Ray and without a training step.

    python -m benchmarks.reshard --shape 0.5b --engine vllm --syncs 20
    torchrun --nproc-per-node 4 -m benchmarks.reshard --shape 7b --engine vllm --tensor-parallel 2
    python -m benchmarks.reshard --shape tiny --engine torch --device cpu

Prints medians of gather, load, checksum and cache reset, and writes them with every single sync to
benchmarks/results/reshard_SHAPE_RANKS_tpTENSOR.json. The first two syncs warm up (and are followed by a probe): they do not
count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.record import circumstances, command
from benchmarks.shapes import SHAPES, make_model
from hybridflow.config.schema import Config
from hybridflow.parallel.mesh import init_process_group
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker

WARM_UP_SYNCS = 2


def build(options: argparse.Namespace, rank: int, num_ranks: int) -> RolloutWorker:
    """Actor and rollout worker of this rank, in one process as on a shared pool."""
    device = (
        torch.device(options.device, int(os.environ.get("LOCAL_RANK", 0))) if options.device == "cuda" else torch.device("cpu")
    )
    address = f"tcp://{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29511')}"
    init_process_group(rank=rank, world_size=num_ranks, meeting_place=address, device=device)
    folder = options.folder / options.shape
    if rank == 0:
        make_model(folder, SHAPES[options.shape])
    torch.distributed.barrier()
    base = Config()
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, path=str(folder / "model"), tokenizer=str(folder / "tokenizer")),
        rollout=dataclasses.replace(
            base.rollout,
            engine=options.engine,
            tensor_parallel=options.tensor_parallel,
            memory_fraction=0.3,
            enforce_eager=True,
        ),
        placement=dataclasses.replace(base.placement, pools={"main": f"1x{num_ranks}"}),
    )
    peers: dict[str, Worker] = {}
    roles: tuple[tuple[str, type[Worker]], ...] = (("actor", ActorWorker), ("rollout", RolloutWorker))
    for role, worker_class in roles:
        layout = worker_class.layout_of(config, num_ranks)
        group = torch.distributed.group.WORLD
        peers[role] = worker_class(
            config, RankContext(role=role, rank=rank, layout=layout, device=device, group=group, peers=peers)
        )
    rollout = peers["rollout"]
    assert isinstance(rollout, RolloutWorker)
    return rollout


def measure(rollout: RolloutWorker, syncs: int) -> list[dict[str, float]]:
    """The metrics of each sync, and its wall-clock seconds."""
    measured = []
    for _ in range(WARM_UP_SYNCS + syncs):
        torch.distributed.barrier()
        started = time.perf_counter()
        metrics = rollout.sync_weights()
        measured.append({**metrics, "seconds_wall": time.perf_counter() - started})
    return measured


def main() -> None:
    """Measure on every rank; rank 0 reports its own numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--syncs", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rollout = build(options, rank, num_ranks)
    measured = measure(rollout, options.syncs)
    counted = measured[WARM_UP_SYNCS:]
    medians = {name: statistics.median(sync.get(name, 0.0) for sync in counted) for name in sorted(counted[0])}
    if rank == 0:
        for name, value in medians.items():
            print(f"{name:28} {value:,.5g}")
        result = {
            **circumstances(command("benchmarks.reshard", num_ranks=num_ranks), options.device),
            "ranks": num_ranks,
            "tensor_parallel": options.tensor_parallel,
            "medians": medians,
            "syncs": measured,
        }
        name = f"reshard_{options.shape}_{num_ranks}_tp{options.tensor_parallel}.json"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / name).write_text(json.dumps(result, indent=1))
    rollout.close()


if __name__ == "__main__":
    main()
