"""How often a rank asks for the shards of its rows: a batch that was collected prompt by prompt has one for each prompt."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
import ray
import torch

from hybridflow.batch import Batch, Ragged, ShardColumn, Source
from hybridflow.controller.rank_process import StoredShard
from hybridflow.parallel.layout import Layout
from hybridflow.workers.base import RankContext
from hybridflow.workers.microbatches import Microbatches


@dataclass(frozen=True)
class CountingShard:
    """One row that says how often it was asked for."""

    columns: dict[str, ShardColumn]
    num_rows: int = 1
    asked: list[int] = field(default_factory=list)

    def fetch(self) -> dict[str, ShardColumn]:
        self.asked.append(1)
        return self.columns


def test_a_shard_in_the_object_store_is_fetched_once_in_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(ray, "get", lambda reference: fetched.append(reference) or {"prompt": [reference]})
    shard = StoredShard("one", 1)  # type: ignore[arg-type]
    assert [shard.fetch() for _ in range(3)] == [{"prompt": ["one"]}] * 3 and fetched == ["one"]
    travelled = pickle.loads(pickle.dumps(shard))
    assert travelled == shard and "_columns" not in vars(travelled)
    assert travelled.fetch() == {"prompt": ["one"]} and fetched == ["one", "one"]


def test_a_column_is_read_once_for_all_microbatches() -> None:
    def row(number: int) -> dict[str, ShardColumn]:
        columns = {name: Ragged.from_rows([[number, number + 1]], np.int32) for name in ("prompt", "response")}
        return {**columns, "rollout_log_probs": Ragged.from_rows([[-number, -number - 1.0]], np.float32)}

    shards = tuple(CountingShard(row(number)) for number in range(6))
    batch = Batch(sources=(Source(("prompt", "response", "rollout_log_probs"), shards, range(6)),))
    context = RankContext(role="actor", rank=0, layout=Layout(), device=torch.device("cpu"))
    microbatches = Microbatches(batch, context, tokens_per_microbatch=4)
    before = len(shards[0].asked)
    read = [microbatches.column("rollout_log_probs", microbatch).tolist() for microbatch in microbatches]
    assert sorted(read) == sorted([-number, -number - 1.0] for number in range(6))
    assert len(microbatches) == 6 and all(len(shard.asked) == before + 1 for shard in shards)
