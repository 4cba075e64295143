"""Weights of one actor to the engine on the same GPU: recorded loads bring what plain ones would."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from hybridflow.config.schema import Config, DataConfig, ModelConfig, RolloutConfig
from tests.gpu.colocated import actor_and_rollout
from tests.toy import make_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA device")]
NO_VLLM = importlib.util.find_spec("vllm") is None


@pytest.mark.parametrize(
    "engine", ["torch", pytest.param("vllm", marks=pytest.mark.skipif(NO_VLLM, reason="NOT RUN: no vLLM"))]
)
def test_recorded_loads_keep_engine_and_trainer_equal(tmp_path: Path, engine: str) -> None:
    config = Config(
        model=ModelConfig(path=make_tiny_model(tmp_path / "model", hidden_size=128, num_attention_heads=2)),
        data=DataConfig(max_prompt_tokens=400, max_response_tokens=100),
        rollout=RolloutConfig(engine=engine, max_num_seqs=4, gpu_memory_utilization=0.1, sync_bucket_mib=1),
    )
    actor, rollout = actor_and_rollout(config)
    for _ in range(4):
        for _, tensor in actor.named_tensors():
            tensor.detach().to_local().mul_(1.1)
        rollout.sync_weights()  # raises where checksums differ
    colocated = rollout.weight_sync.colocated
    assert colocated is not None
    with rollout.engine.paused() as paused:
        assert colocated.loads.are_recorded(paused)
    rollout.weight_sync.num_syncs = 0  # the next sync compares log-probabilities too
    rollout.sync_weights()
    assert rollout.weight_sync.probe_difference is not None
    rollout.close()
