"""Generation alone: an engine in this process, without Ray, training or weight syncs.

    python -m benchmarks.generation --shape 0.5b --requests 64 512
    python -m benchmarks.generation --shape tiny --engine torch --device cpu --requests 16 --tokens 32

Every request has its own seed and asks for log-probabilities, as in training. With vLLM further passes show what parts of ours
are worth: its scheduler before every token; and where it pays for seeds, as its first model runner does, no seeds, and on CUDA
seeds with its own sampling. Repetitions of the passes alternate, so that a host that drifts hits all alike; the first of each
warms up. Other engines have one pass.

Prints seconds and tokens per second, and writes every repetition to benchmarks/results/generation_SHAPE_ENGINE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.record import circumstances, command
from benchmarks.shapes import NUM_SPECIAL, SHAPES, make_model
from hybridflow import registry
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Sampling

if TYPE_CHECKING:
    from hybridflow.rollout.vllm_engine import VllmEngine

PROMPT_TOKENS = (60, 180)
"""About the lengths of GSM8K with its instruction."""
Passes = Mapping[str, Callable[[], AbstractContextManager[None]]]
"""Name -> what the engine does otherwise within the context."""


def start(options: argparse.Namespace) -> Engine:
    """The engine on a model of real shape with random weights."""
    folder = options.folder / options.shape
    make_model(folder, SHAPES[options.shape])
    engine_class = registry.load(options.engine, registry.ENGINES, key="--engine")
    assert isinstance(engine_class, type) and issubclass(engine_class, Engine)
    spec = EngineSpec(
        model=str(folder / "model"),
        tokenizer=str(folder / "tokenizer"),
        dtype="bfloat16" if options.device == "cuda" else "float32",
        max_model_tokens=PROMPT_TOKENS[1] + options.tokens,
        max_num_seqs=1024,
        seed=0,
        seed_requests=options.engine != "vllm",  # vLLM then shows whether it heeds them all the same; `passes_of` tells it to
        device=torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"),
        layout=Layout(),
        rank=0,
        gpu_memory_utilization=0.4,
        cpu_cache_gib=1.0,
        enforce_eager=options.device == "cpu",
    )
    return engine_class(spec)


def passes_of(engine: Engine, options: argparse.Namespace) -> Passes:
    """What is measured of this engine, which heeds seeds from now on."""
    passes: dict[str, Callable[[], AbstractContextManager[None]]] = {"a seed each": nullcontext}
    if options.engine != "vllm":
        return passes
    from hybridflow.rollout.vllm_engine import VllmEngine
    from hybridflow.rollout.vllm_patches import sample_row_by_row

    assert isinstance(engine, VllmEngine)
    passes["a seed each, every token scheduled"] = one_step_at_a_time
    if engine.heeds_seeds:
        return passes
    engine.heeds_seeds = True
    passes["no seeds"] = lambda: without_seeds(engine)
    if options.device == "cuda" and sample_row_by_row is not None:
        passes["a seed each, vLLM's sampling"] = sampled_by_vllm
    return passes


@contextmanager
def one_step_at_a_time() -> Iterator[None]:
    """vLLM's scheduler runs before every token."""
    from hybridflow.rollout.vllm_scheduler import MultiStepScheduler

    ours = MultiStepScheduler.max_steps
    MultiStepScheduler.max_steps = 1
    try:
        yield
    finally:
        MultiStepScheduler.max_steps = ours


@contextmanager
def without_seeds(engine: VllmEngine) -> Iterator[None]:
    """vLLM samples for all requests from the generator of the device."""
    engine.heeds_seeds = False
    try:
        yield
    finally:
        engine.heeds_seeds = True


@contextmanager
def sampled_by_vllm() -> Iterator[None]:
    """vLLM samples as it would without us: a kernel for each request."""
    from vllm.v1.sample.ops import topk_topp_sampler

    from hybridflow.rollout.vllm_patches import sample_row_by_row

    ours = topk_topp_sampler.random_sample
    topk_topp_sampler.random_sample = sample_row_by_row
    try:
        yield
    finally:
        topk_topp_sampler.random_sample = ours


def requests(count: int, tokens: int, vocabulary: int) -> list[Request]:
    """Prompts of random tokens, each request with its own seed."""
    rng = np.random.default_rng(count)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    lengths = rng.integers(*PROMPT_TOKENS, count)
    prompts = [rng.integers(NUM_SPECIAL, vocabulary, length).astype(np.int32) for length in lengths]
    return [Request(id=i, prompt=prompt, sampling=sampling, seed=i) for i, prompt in enumerate(prompts)]


def measure(engine: Engine, passes: Passes, asked: list[Request], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition of each pass after the first. Cached prompts are forgotten in between."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(1 + repeats):
        for name, altered in passes.items():
            with altered():
                engine.reset_prefix_cache()
                started = time.perf_counter()
                responses = engine.generate(asked)
                seconds[name].append(time.perf_counter() - started)
            assert len(responses) == len(asked)
    return {name: taken[1:] for name, taken in seconds.items()}


def main() -> None:
    """Measure every number of requests in every pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("outputs/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    engine = start(options)
    passes = passes_of(engine, options)
    measured: dict[str, list[float]] = {}
    for count in options.requests:
        asked = requests(count, options.tokens, SHAPES[options.shape].vocabulary)
        for name, seconds in measure(engine, passes, asked, options.repeats).items():
            label = f"{count} x {options.tokens}, {name}"
            measured[label] = seconds
            median = statistics.median(seconds)
            print(f"{label:44} {median:8.3f} s {count * options.tokens / median:10,.0f} tokens/s")
    engine.close()
    result = {**circumstances(command("benchmarks.generation"), options.device), "seconds": measured}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"generation_{options.shape}_{options.engine}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
