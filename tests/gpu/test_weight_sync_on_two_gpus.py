"""Weights of an actor that is cut over two GPUs to engines on both, over NCCL: whole to two engines, in parts to one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hybridflow.config.schema import Config, DataConfig, ModelConfig, PlacementConfig, RolloutConfig
from hybridflow.parallel.mesh import init_process_group
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker
from tests.toy import make_tiny_model

NUM_RANKS = 2
NO_VLLM = importlib.util.find_spec("vllm") is None
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < NUM_RANKS, reason="NOT RUN: needs two CUDA devices"),
]


def sync_several_times(rank: int, folder: str, engine: str, tensor_parallel: int, sleep: bool) -> None:
    device = torch.device("cuda", rank)
    init_process_group(rank=rank, world_size=NUM_RANKS, rendezvous=f"file://{folder}/meet", device=device, timeout_s=120)
    config = Config(
        model=ModelConfig(path=f"{folder}/model"),
        data=DataConfig(max_prompt_tokens=400, max_response_tokens=100),
        rollout=RolloutConfig(
            engine=engine,
            tensor_parallel=tensor_parallel,
            max_num_seqs=4,
            gpu_memory_utilization=0.1,
            sync_bucket_mib=1,
            sleep=sleep,
        ),
        placement=PlacementConfig(pools={"main": f"1x{NUM_RANKS}"}),
    )
    roles: dict[str, Worker] = {}
    for role, kind in (("actor", ActorWorker), ("rollout", RolloutWorker)):
        layout = kind.layout_of(config, NUM_RANKS)
        context = RankContext(role=role, rank=rank, layout=layout, device=device, group=dist.group.WORLD, peers=roles)
        roles[role] = kind(config, context)
    actor, rollout = roles["actor"], roles["rollout"]
    assert isinstance(actor, ActorWorker) and isinstance(rollout, RolloutWorker)
    for _ in range(4):  # recorded launches begin with the second
        for _, tensor in actor.named_tensors():
            tensor.detach().to_local().mul_(1.1)
        rollout.weight_sync.num_syncs = 0  # the probe compares log-probabilities after each
        metrics = rollout.sync_weights()  # raises where checksums differ
        assert metrics["sync/tensors_unreadable"] == 0
        assert metrics["sync/bytes_received"] == metrics["sync/bytes_missing"] > 0
        if sleep:
            rollout.sleep()
            rollout.wake_up()
    rollout.close()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("engine", "tensor_parallel", "sleep"),
    [
        ("torch", 1, False),
        pytest.param("vllm", 1, False, marks=pytest.mark.skipif(NO_VLLM, reason="NOT RUN: no vLLM")),
        pytest.param("vllm", 2, False, marks=pytest.mark.skipif(NO_VLLM, reason="NOT RUN: no vLLM")),
        pytest.param("vllm", 2, True, marks=pytest.mark.skipif(NO_VLLM, reason="NOT RUN: no vLLM")),
    ],
)
def test_engines_on_two_gpus_hold_what_was_trained(tmp_path: Path, engine: str, tensor_parallel: int, sleep: bool) -> None:
    make_tiny_model(tmp_path / "model", hidden_size=128, num_attention_heads=2, num_key_value_heads=2)
    mp.spawn(sync_several_times, args=(str(tmp_path), engine, tensor_parallel, sleep), nprocs=NUM_RANKS)
