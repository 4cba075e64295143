"""Milliseconds and peak memory of the chunked output layer, eager and compiled: python benchmarks/output_layer.py on a GPU.

The default sizes are Qwen2.5-0.5B and a microbatch of 20,000 response tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch

from hybridflow.ops.log_probs import EAGER, ChunkKernels, LinearLogProbs, compiled_kernels

NUM_WARM_UPS = 3
NUM_REPEATS = 10


def milliseconds(function: Callable[[], object]) -> float:
    """Median time of a call on the device."""
    for _ in range(NUM_WARM_UPS):
        function()
    times = []
    for _ in range(NUM_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(layer: LinearLogProbs, sizes: argparse.Namespace) -> dict[str, float]:
    """Times of forward alone and of forward with backward, utilisation of 790 TFLOP/s, and the peak above the inputs."""
    hidden_TH = torch.randn(sizes.tokens, sizes.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.randn(sizes.vocabulary, sizes.hidden, device="cuda", dtype=torch.bfloat16).div_(30).requires_grad_()
    targets_T = torch.randint(0, sizes.vocabulary, (sizes.tokens,), device="cuda")

    def forward() -> torch.Tensor:
        log_probs_T, entropy_T = layer(hidden_TH, weight_VH, targets_T)
        return log_probs_T.sum() if entropy_T is None else log_probs_T.sum() + entropy_T.sum()

    with torch.no_grad():
        forward_ms = milliseconds(forward)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both_ms = milliseconds(lambda: torch.autograd.grad(forward(), (hidden_TH, weight_VH)))
    flops = 8 * sizes.tokens * sizes.hidden * sizes.vocabulary  # four products: logits twice, and one for each gradient
    return {
        "forward_ms": round(forward_ms, 2),
        "forward_backward_ms": round(both_ms, 2),
        "utilisation": round(flops / both_ms / 1e-3 / 790e12, 3),
        "peak_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    sizes = parser.parse_args()
    variants: dict[str, Callable[[], ChunkKernels]] = {"eager": lambda: EAGER, "compiled": compiled_kernels}
    for name, kernels in variants.items():
        for with_entropy in (False, True):
            for chunk_tokens in (1024, 4096):
                layer = LinearLogProbs(chunk_tokens=chunk_tokens, with_entropy=with_entropy, kernels=kernels())
                settings = {"kernels": name, "with_entropy": with_entropy, "chunk_tokens": chunk_tokens}
                print(json.dumps(settings | measure(layer, sizes)), flush=True)


if __name__ == "__main__":
    main()
