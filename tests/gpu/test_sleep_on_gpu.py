"""An engine that gives its memory back while others learn, and takes it again with the next weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridflow.config.schema import Config, DataConfig, ModelConfig, RolloutConfig
from hybridflow.rollout.base import Request, Sampling
from tests.gpu.colocated import actor_and_rollout
from tests.toy import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT RUN: no vLLM"),
]
GPU_MEMORY_UTILIZATION = 0.2
SHARE_GIVEN_BACK = 0.9
"""Of the engine's memory, at least; CUDA graphs stay."""


def test_vllm_sleeps_between_syncs_and_generates_as_if_it_had_not(tmp_path: Path) -> None:
    config = Config(
        model=ModelConfig(path=make_tiny_model(tmp_path / "model", hidden_size=128, num_attention_heads=2)),
        data=DataConfig(max_prompt_tokens=200, max_response_tokens=100),
        rollout=RolloutConfig(engine="vllm", max_num_seqs=16, gpu_memory_utilization=GPU_MEMORY_UTILIZATION, sleep=True),
    )
    actor, rollout = actor_and_rollout(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 60, 150).astype(np.int32) for _ in range(16)]
    greedy = Sampling(temperature=0.0, max_tokens=80, ignore_eos=True)
    asked = [Request(id=number, prompt=prompt, sampling=greedy) for number, prompt in enumerate(prompts)]
    answers: list[list[list[int]]] = []
    for _ in range(3):
        for _, tensor in actor.named_tensors():
            tensor.detach().to_local().mul_(1.1)
        rollout.sync_weights()
        expected = [response.tokens.tolist() for response in rollout.engine.generate(asked)]
        free, total = torch.cuda.mem_get_info()
        rollout.sleep()
        assert torch.cuda.mem_get_info()[0] - free > SHARE_GIVEN_BACK * GPU_MEMORY_UTILIZATION * total
        rollout.wake_up()
        rollout.weight_sync.num_syncs = 0  # the next sync compares log-probabilities too
        rollout.sync_weights()  # raises where checksums differ
        assert [response.tokens.tolist() for response in rollout.engine.generate(asked)] == expected
        answers.append(expected)
    assert answers[0] != answers[1] != answers[2], "the test itself: other weights answer otherwise"
    rollout.close()
