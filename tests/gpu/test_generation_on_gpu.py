"""vLLM on the GPU with our draws in place: seeds decide, whatever is generated beside them, and however prompts are cut."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Sampling
from hybridflow.rollout.torch_engine import TorchEngine
from tests.toy import make_tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="NOT RUN: no vLLM"),
]
RANDOM = Sampling(max_tokens=24, ignore_eos=True)
NUM_REQUESTS = 40
MOST_CHANGED = 4
"""Responses that rounding may change: bfloat16 kernels differ with the number of rows, and a token near the border of two falls
to the other side."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128, num_attention_heads=2)


def spec(model: str, **options: object) -> EngineSpec:
    return EngineSpec(
        model=model,
        dtype="bfloat16",
        max_model_tokens=256,
        max_requests=64,
        seed=0,
        device=torch.device("cuda", 0),
        layout=Layout(),
        rank=0,
        memory_fraction=0.05,
        cpu_cache_gib=1.0,
        enforce_eager=True,
        options=options,
    )


@pytest.fixture(scope="module")
def engine(model: str) -> Iterator[Engine]:
    """Prompts come in chunks."""
    from hybridflow.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(spec(model, max_num_batched_tokens=64, enable_prefix_caching=False))
    yield engine
    engine.close()


def requests(sampling: Sampling = RANDOM) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 60, rng.integers(20, 150)).astype(np.int32) for _ in range(NUM_REQUESTS)]
    return [Request(id=i, prompt=prompt, sampling=sampling, seed=1000 + i) for i, prompt in enumerate(prompts)]


def changed(engine: Engine, asked: list[Request], expected: list[list[int]]) -> int:
    """How many responses are others than expected."""
    found = {response.id: response.tokens.tolist() for response in engine.generate(asked)}
    return sum(found[number] != tokens for number, tokens in enumerate(expected))


def test_seeds_decide_whatever_is_generated_beside_them(engine: Engine) -> None:
    asked = requests()
    expected = [response.tokens.tolist() for response in engine.generate(asked)]
    assert len({tuple(tokens) for tokens in expected}) == NUM_REQUESTS
    assert changed(engine, asked[::-1], expected) <= MOST_CHANGED
    greedy = [Request(id=900 + i, prompt=asked[i].prompt, sampling=Sampling(temperature=0.0, max_tokens=9)) for i in range(5)]
    assert changed(engine, [*greedy, *asked], expected) <= MOST_CHANGED
    alone = [engine.generate([request])[0].tokens.tolist() for request in asked[:5]]
    assert sum(ours != theirs for ours, theirs in zip(alone, expected, strict=False)) <= 1


def test_the_torch_engine_draws_the_same_tokens(engine: Engine, model: str) -> None:
    asked = requests()
    expected = [response.tokens.tolist() for response in TorchEngine(spec(model)).generate(asked)]
    assert changed(engine, asked, expected) <= MOST_CHANGED
