"""An engine computes what an actor with adapters trains: merged weights on one rank and on two, over gloo."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from hybridflow.config.schema import Config, DataConfig, ModelConfig, PlacementConfig, RolloutConfig, TrainingConfig
from hybridflow.ops.losses import NextTokenLoss
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.proof import PROBED_SYNCS
from hybridflow.workers.rollout import RolloutWorker
from tests.distributed.ranks import on_ranks
from tests.toy import make_tiny_model
from tests.training_rows import context_of, random_batch


class Compared(NamedTuple):
    """What a rank saw after a sync."""

    moved: float
    """Mean |difference| in nats that the update made to the trainer's log-probabilities."""
    probed: float
    """Mean |difference| in nats between engine and trainer."""
    num_unreadable: float
    """Weights of the engine without a checksum."""


def update_and_sync(model: str, engine: str, num_ranks: int) -> list[Compared]:
    """Real workers: updates at a rate high enough that weights without their adapters would be told by the probe."""
    config = Config(
        model=ModelConfig(path=model, lora_rank=4),
        data=DataConfig(max_prompt_tokens=400, max_response_tokens=100),
        actor=TrainingConfig(learning_rate=1e-2),
        rollout=RolloutConfig(
            engine=engine,
            tensor_parallel=num_ranks if engine == "vllm" else 1,
            max_num_seqs=4,
            cpu_cache_gib=0.1,
            sync_bucket_mib=1,
        ),
        placement=PlacementConfig(pools={"main": f"1x{num_ranks}"}),
    )
    roles: dict[str, Worker] = {}
    for role, kind in (("actor", ActorWorker), ("rollout", RolloutWorker)):
        context = dataclasses.replace(context_of(role, kind.layout_of(config, num_ranks)), peers=roles)
        roles[role] = kind(config, context)
    actor, rollout = roles["actor"], roles["rollout"]
    assert isinstance(actor, ActorWorker) and isinstance(rollout, RolloutWorker)
    actor.begin_step(1, 1)
    rows = random_batch([(30, 30), (20, 40)], seed=0)
    seen = []
    for _ in range(PROBED_SYNCS):
        before = actor.log_probs(rows).tokens("log_probs").values
        actor.update(rows, loss=NextTokenLoss())
        after = actor.log_probs(rows).tokens("log_probs").values
        metrics = rollout.sync_weights()
        assert rollout.weight_sync.probe_difference is not None
        moved = float(np.abs(after - before).mean())
        seen.append(Compared(moved, rollout.weight_sync.probe_difference, metrics["sync/tensors_unreadable"]))
    rollout.close()
    return seen


def assert_engines_follow(ranks: list[list[Compared]]) -> None:
    for syncs in ranks:
        assert len(syncs) == PROBED_SYNCS
        for compared in syncs:
            assert compared.moved > 0.1, "else the probe could not tell"
            assert compared.probed < 1e-4
            assert compared.num_unreadable == 0


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_torch_engine_agrees_with_an_actor_that_trains_adapters(tiny_model: str, num_ranks: int):
    assert_engines_follow(on_ranks(num_ranks, update_and_sync, tiny_model, "torch", num_ranks))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT RUN: vLLM is not installed")
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_vllm_cut_over_all_ranks_agrees_with_an_actor_that_trains_adapters(tmp_path: Path, num_ranks: int):
    model = make_tiny_model(tmp_path / "model", hidden_size=128)
    assert_engines_follow(on_ranks(num_ranks, update_and_sync, model, "vllm", num_ranks))
