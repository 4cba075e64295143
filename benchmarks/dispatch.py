"""What the controller costs: bytes per step, and calls beside plain Ray moving the same bytes.

    python benchmarks/dispatch.py [--out benchmarks/results/dispatch.json]

Runs on CPU in about a minute. Three parts:
1. a PPO-shaped step over 4,096 rows x 8,192 tokens with four per-token columns, rows being scored while others are generated:
   bytes that pass through the controller;
2. a call without work over 2 ranks, beside two plain Ray actor calls that carry the same few bytes (role, method and no
   arguments), and beside two that carry nothing;
3. 48 MiB to 2 ranks and back, beside plain Ray `put`, call and `get` of the same bytes.
Parts 2 and 3 are medians of interleaved repetitions in the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import ray

from hybridflow.batch import Batch, LocalShard, Ragged, Source
from hybridflow.config.pools import parse_pool
from hybridflow.config.schema import Config
from hybridflow.controller.cost import CallLog
from hybridflow.controller.group import GroupDispatcher, Pool
from hybridflow.controller.placement import start_pool
from hybridflow.controller.rank_process import StoredShard
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Sampling
from hybridflow.workers.base import Worker
from hybridflow.workers.remote import remote
from hybridflow.workers.respond import respond_in_parts

NUM_RANKS = 2
ECHO_BYTES = 48 * 2**20


class DispatchWorker(Worker):
    """Stands for the roles of a PPO step: per-token columns in, per-token columns out, no arithmetic."""

    is_distributed = False

    @remote("split_by_data_rank")
    def submit(self, batch: Batch, *, sampling: Sampling) -> None:
        """Note which rows get responses of `sampling.max_tokens` tokens, last row first."""
        self.tokens, self.left = sampling.max_tokens, batch["position"][::-1]

    @remote("gather_rows")
    def take_finished(self, at_least: int, timeout_s: float | None = None) -> Batch:
        """The next responses, with log-probabilities."""
        rows, self.left = np.split(self.left, [min(at_least, len(self.left))])
        lengths = np.full(len(rows), self.tokens)
        ids = Ragged.from_lengths(np.zeros(lengths.sum(), np.int32), lengths)
        log_probs = Ragged(np.zeros(len(ids.values), np.float32), ids.offsets)
        columns = {"response": ids, "rollout_log_probs": log_probs, "response_tokens": lengths}
        return Batch.from_columns({**columns, "truncated": lengths > 0, "position": rows[::-1]})

    @remote("rank_zero")
    def scores_rows_alone(self) -> bool:
        """Scoring may begin with the first part."""
        return True

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        """Rewards."""
        return Batch({"reward": np.zeros(len(batch), np.float32), "reward_failed": np.zeros(len(batch), np.bool_)})

    @remote("split_by_data_rank")
    def token_column(self, batch: Batch, *, name: str) -> Batch:
        """A float32 column as long as the responses."""
        ids = batch.tokens("response")
        return Batch.from_columns({name: Ragged(np.zeros(len(ids.values), np.float32), ids.offsets)})

    @remote("split_by_data_rank")
    def update(self, batch: Batch) -> Metrics:
        """Reads what an update reads."""
        read = [batch.tokens(name).values[:1] for name in ("response", "log_probs", "values")]
        return Metrics({"read": float(sum(len(column) for column in read))})

    @remote("one_to_all")
    def nothing(self) -> None:
        """A call without work."""

    @remote("split_by_data_rank")
    def echo(self, batch: Batch) -> Batch:
        """The payload, as a new column."""
        payload = batch.tokens("payload")
        return Batch.from_columns({"payload": Ragged(payload.values, payload.offsets)})


@ray.remote(num_cpus=0)
class PlainActor:
    """The same work without the framework."""

    def nothing(self, invocation: object = None) -> None:
        """A call without work."""

    def echo(self, payload: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The payload."""
        return payload


def step(group: DispatchWorker, rows: int, tokens: int) -> Metrics:
    """The calls of a PPO step with 4 updates; returns what the controller counted."""
    assert isinstance(group.dispatcher, GroupDispatcher)
    group.dispatcher.log.drain()
    columns = {"prompt_tokens": np.full(rows, 16), "group": np.arange(rows), "seed": np.arange(rows)}
    batch = Batch.from_columns(columns)
    batch = respond_in_parts(batch, group, group, Sampling(max_tokens=tokens))
    pending = [group.token_column.start(batch, name=name) for name in ("log_probs", "values", "reference_log_probs")]
    batch = batch.join(*(call.result() for call in pending))
    order = np.random.default_rng(0).permutation(rows)
    for call in [group.update.start(part) for part in batch.select(order).split(rows // 4)]:
        call.result()
    return group.dispatcher.log.drain()


def medians(repetitions: int, **calls: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each call, repeated in turns so that noise of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions + 2):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if repetition >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def start_group(pool: Pool) -> DispatchWorker:
    """A group on all ranks of the pool."""
    layout = Layout(data=NUM_RANKS)
    name = "benchmarks.dispatch:DispatchWorker"
    ray.get([process.create.remote("dispatch", name, Config(), layout) for process in pool.processes])
    return DispatchWorker.group(GroupDispatcher("dispatch", pool, layout, timeout_s=600, log=CallLog()))


def in_store(batch: Batch) -> Batch:
    """The batch with every column that lies in this process moved to the object store."""
    sources = []
    for source in batch.sources:
        assert all(isinstance(shard, LocalShard) for shard in source.shards), "some columns are in the store already"
        shards = tuple(StoredShard(ray.put(dict(shard.fetch())), shard.num_rows) for shard in source.shards)
        sources.append(Source(source.names, shards, source.positions))
    return Batch(batch.per_row, tuple(sources))


def measure(rows: int, tokens: int) -> dict[str, object]:
    """All three parts."""
    pool, _ = start_pool("main", parse_pool(f"1x{NUM_RANKS} cpu"), "cpu", {})
    group, plain = start_group(pool), [PlainActor.remote() for _ in range(NUM_RANKS)]
    steps = {str(length): dict(step(group, rows, length)) for length in (tokens // 64, tokens)}
    noop = medians(
        200,
        hybridflow=group.nothing,
        plain_ray=lambda: ray.get([actor.nothing.remote(("dispatch", "nothing", (), {})) for actor in plain]),
        plain_ray_without_argument=lambda: ray.get([actor.nothing.remote() for actor in plain]),
    )
    payload = np.zeros(ECHO_BYTES // 4, np.float32)
    lengths = np.full(64, len(payload) // 64)
    half = len(payload) // NUM_RANKS

    def echo_here() -> None:
        batch = in_store(Batch.from_columns({"payload": Ragged.from_lengths(payload, lengths), "prompt_tokens": lengths}))
        echoed = group.echo(batch)
        for source in echoed.sources:
            for shard in source.shards:
                shard.fetch()

    def echo_plain() -> None:
        parts = [ray.put(payload[rank * half : (rank + 1) * half]) for rank in range(NUM_RANKS)]
        ray.get([actor.echo.remote(part) for actor, part in zip(plain, parts, strict=True)])

    echo = medians(15, hybridflow=echo_here, plain_ray=echo_plain)
    return {"rows": rows, "tokens": tokens, "steps": steps, "noop_seconds": noop, "echo_48mib_seconds": echo}


def main() -> None:
    """Measure, print the table, write the raw numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=6 * 2**30)
    result = measure(options.rows, options.tokens)
    ray.shutdown()
    for length, metrics in result["steps"].items():
        print(f"{options.rows} rows x {length} tokens: {metrics['controller/bytes_per_step']:,.0f} bytes per step, ", end="")
        print(f"{metrics['controller/milliseconds_per_step']:.1f} ms in {metrics['controller/calls']:.0f} calls")
    for name in ("noop_seconds", "echo_48mib_seconds"):
        ours, plain = (statistics.median(result[name][side]) * 1e3 for side in ("hybridflow", "plain_ray"))
        print(f"{name.removesuffix('_seconds')}: {ours:.2f} ms, plain Ray {plain:.2f} ms, ratio {ours / plain:.2f}")
    bare = statistics.median(result["noop_seconds"]["plain_ray_without_argument"]) * 1e3
    print(f"noop of plain Ray without an argument: {bare:.2f} ms")
    if options.out:
        versions = {"python": platform.python_version(), "ray": ray.__version__, "numpy": np.__version__}
        stamp = {"date": time.strftime("%Y-%m-%d"), "versions": versions, "command": "python benchmarks/dispatch.py"}
        options.out.write_text(json.dumps({**stamp, **result}, indent=1))


if __name__ == "__main__":
    main()
