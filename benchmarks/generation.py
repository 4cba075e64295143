"""Generation alone: an engine in this process, without Ray, training or weight syncs.

    python -m benchmarks.generation --shape 0.5b --requests 64 512
    python -m benchmarks.generation --shape tiny --engine torch --device cpu --requests 16 --tokens 32

Every request has its own seed and asks for log-probabilities, as in training; then the same without seeds. Prints seconds and
tokens per second, and writes every repetition to benchmarks/results/generation_SHAPE_ENGINE.json. The first one warms up.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.shapes import NUM_SPECIAL, SHAPES, make_model
from hybridflow import registry
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Sampling

PROMPT_TOKENS = (60, 180)
"""About the lengths of GSM8K with its instruction."""


def start(options: argparse.Namespace, *, seed_requests: bool) -> Engine:
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
        max_requests=1024,
        seed=0,
        seed_requests=seed_requests,
        device=torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu"),
        layout=Layout(),
        rank=0,
        memory_fraction=0.4,
        cpu_cache_gib=1.0,
        enforce_eager=options.device == "cpu",
    )
    return engine_class(spec)


def requests(count: int, tokens: int, vocabulary: int) -> list[Request]:
    """Prompts of random tokens, each request with its own seed."""
    rng = np.random.default_rng(count)
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    lengths = rng.integers(*PROMPT_TOKENS, count)
    prompts = [rng.integers(NUM_SPECIAL, vocabulary, length).astype(np.int32) for length in lengths]
    return [Request(id=i, prompt=prompt, sampling=sampling, seed=i) for i, prompt in enumerate(prompts)]


def measure(engine: Engine, asked: list[Request], repeats: int) -> list[float]:
    """Seconds of each repetition after the first. Cached prompts are forgotten in between."""
    seconds = []
    for _ in range(1 + repeats):
        engine.forget_prefixes()
        started = time.perf_counter()
        responses = engine.generate(asked)
        seconds.append(time.perf_counter() - started)
        assert len(responses) == len(asked)
    return seconds[1:]


def main() -> None:
    """Measure every number of requests, with seeds and without."""
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
    measured: dict[str, list[float]] = {}
    for seed_requests in (True, False):
        engine = start(options, seed_requests=seed_requests)
        for count in options.requests:
            name = f"{count} x {options.tokens}, {'a seed each' if seed_requests else 'no seeds'}"
            asked = requests(count, options.tokens, SHAPES[options.shape].vocabulary)
            measured[name] = measure(engine, asked, options.repeats)
            median = statistics.median(measured[name])
            print(f"{name:32} {median:8.3f} s {count * options.tokens / median:10,.0f} tokens/s")
        engine.close()
        del engine
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "command": f"python -m benchmarks.generation --shape {options.shape} --engine {options.engine}",
        "seconds": measured,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"generation_{options.shape}_{options.engine}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
