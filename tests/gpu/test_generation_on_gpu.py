"""vLLM on the GPU with our sampling in place: seeds decide, whatever is generated beside them, and however prompts are cut."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Sampling
from hybridflow.rollout.seeds import uniform
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
MOST_OUTSIDE, LARGEST_STEP = 0.3, 0.15
"""Share of the tokens that rounding moves across a border of the float32 model, and by how much probability. The torch engine
in bfloat16 has 0.16 and 0.05; numbers of other places or seeds would give 0.8 and 0.9."""
UNLIKELY_DISTANCE = 1.95
"""Over the root of the number of values: uniform ones reach it once in a thousand times."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128, num_attention_heads=2)


def spec(model: str, **options: object) -> EngineSpec:
    return EngineSpec(
        model=model,
        dtype="bfloat16",
        max_model_tokens=256,
        max_num_seqs=64,
        seed=0,
        device=torch.device("cuda", 0),
        layout=Layout(),
        rank=0,
        gpu_memory_utilization=0.05,
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


@torch.no_grad()
def test_tokens_are_drawn_as_the_model_says(engine: Engine, model: str) -> None:
    """By a model in float32, up to what bfloat16 changes. With the first model runner the number of a seed and place lies
    between the probabilities up to the token, as in the torch engine; the second one has noise of its own, so there a number
    between them, drawn anew, is as likely to be anywhere from 0 to 1 (Kolmogorov and Smirnov's distance)."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).cuda()
    outside, places = list[float](), list[float]()
    torch.manual_seed(0)
    asked = requests()
    for response in engine.generate(asked):
        request = asked[response.id]
        tokens = torch.from_numpy(np.concatenate([request.prompt, response.tokens])).long().cuda()
        probs_LV = reference(tokens[None]).logits[0, len(request.prompt) - 1 : -1].double().softmax(-1)
        numbers_L = torch.from_numpy(
            uniform(np.full(len(response.tokens), request.seed, np.uint64), np.arange(len(response.tokens)))
        ).cuda()
        chosen_L1 = tokens[len(request.prompt) :, None]
        above_L = probs_LV.cumsum(-1).gather(1, chosen_L1).squeeze(1)
        below_L = above_L - probs_LV.gather(1, chosen_L1).squeeze(1)
        outside += torch.maximum(below_L - numbers_L, numbers_L - above_L).clamp(min=0).tolist()
        places += (below_L + torch.rand_like(below_L) * (above_L - below_L)).tolist()
    assert len(outside) == NUM_REQUESTS * RANDOM.max_tokens
    assert kolmogorov_smirnov(places) < UNLIKELY_DISTANCE / len(places) ** 0.5
    if not engine.engine.vllm_config.use_v2_model_runner:
        assert np.count_nonzero(outside) <= MOST_OUTSIDE * len(outside)
        assert max(outside) <= LARGEST_STEP


def kolmogorov_smirnov(values: list[float]) -> float:
    """The largest distance between the share of values below a number from 0 to 1 and that number."""
    found, steps = np.sort(values), np.arange(len(values) + 1) / len(values)
    return float(max((found - steps[:-1]).max(), (steps[1:] - found).max()))
