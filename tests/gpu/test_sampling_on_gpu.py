"""Tokens that are sampled on the GPU for requests with seeds, in place of vLLM's own kernels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridflow.rollout.sampling import sample
from hybridflow.rollout.seeds import uniform

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA device")]
VOCABULARY = 151_936


def test_a_gpu_draws_what_a_cpu_draws() -> None:
    probs_BV = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0)).mul_(3).softmax(-1)
    numbers_B = torch.from_numpy(uniform(np.arange(64, dtype=np.uint64), np.arange(64)))
    assert sample(probs_BV.cuda(), numbers_B.cuda()).tolist() == sample(probs_BV, numbers_B).tolist()


def test_samples_at_once_do_not_wait_for_the_device_and_count_tokens() -> None:
    pytest.importorskip("vllm", reason="NOT RUN: no vLLM")
    from hybridflow.rollout.vllm_patches import sample_at_once

    probs_BV = torch.rand(8, VOCABULARY, device="cuda")
    generators = {row: torch.Generator("cuda").manual_seed(row) for row in reversed(range(8))}
    sample_at_once(probs_BV, generators)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens_B = sample_at_once(probs_BV, generators)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected_B = sample(probs_BV.cpu(), torch.from_numpy(uniform(np.arange(8, dtype=np.uint64), np.ones(8, np.int64))))
    assert tokens_B.tolist() == expected_B.tolist()
    assert {generator.get_offset() for generator in generators.values()} == {8}


def test_draws_follow_the_probabilities() -> None:
    probs_V = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125], device="cuda").repeat(400)
    count = 100_000
    numbers = torch.from_numpy(uniform(np.arange(count, dtype=np.uint64), np.zeros(count, np.int64))).cuda()
    tokens = torch.cat([sample(probs_V.expand(len(part), -1).contiguous(), part) for part in numbers.split(10_000)])
    share = torch.bincount(tokens % 5, minlength=5).double() / count
    assert torch.allclose(share.cpu(), torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125]).double(), atol=0.006)
