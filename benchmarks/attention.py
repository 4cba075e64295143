"""Attention within packed rows: torch's kernel beside each release of flash-attn that is installed, on one GPU.

    python -m benchmarks.attention --repeats 20

For each shape: median seconds of a forward pass and of forward and backward, and how far outputs and gradients are from the
same attention in float32 (root mean square of the difference over that of the exact values). The gradients' table is what says
whether a kernel may be trained with. Writes benchmarks/results/attention_DEVICE.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface

from benchmarks.record import circumstances, command
from hybridflow.errors import ModelError
from hybridflow.models import attention
from hybridflow.models.packing import RowSpans

CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Rows:
    """Heads, their channels, and rows of lengths drawn evenly between two bounds."""

    query_heads: int
    key_heads: int
    channels: int
    num_rows: int
    shortest: int
    longest: int


SHAPES = {
    "0.5b, 48 rows of 572 to 692": Rows(14, 2, 64, 48, 572, 692),
    "0.5b, 64 rows of 1 to 1,000": Rows(14, 2, 64, 64, 1, 1000),
    "7b, 14 rows of 1,084 to 1,204": Rows(28, 4, 128, 14, 1084, 1204),
    "7b, 2 rows of 8,192": Rows(28, 4, 128, 2, 8192, 8192),
}
Tensors = list[torch.Tensor]


def draw(rows: Rows) -> tuple[Tensors, torch.Tensor, RowSpans]:
    """Queries, keys and values [1, heads, T, D], the gradient of the output, and where rows end."""
    lengths = np.random.default_rng(0).integers(rows.shortest, rows.longest + 1, rows.num_rows)
    generator = torch.Generator(CUDA).manual_seed(0)

    def normal(heads: int) -> torch.Tensor:
        shape = (1, int(lengths.sum()), heads, rows.channels)
        return torch.randn(shape, generator=generator, device=CUDA, dtype=torch.bfloat16)

    states = [normal(heads).transpose(1, 2).requires_grad_() for heads in (rows.query_heads, rows.key_heads, rows.key_heads)]
    return states, normal(rows.query_heads), RowSpans.of_lengths(lengths, CUDA)


def attend(name: str, states: Tensors, spans: RowSpans) -> torch.Tensor:
    """By the function that transformers would call."""
    output, _ = AttentionInterface()[name](torch.nn.Module(), *states, None, row_spans=spans)
    assert isinstance(output, torch.Tensor)
    return output


def exact(states: Tensors, gradient: torch.Tensor, spans: RowSpans) -> Tensors:
    """Output and gradients in float32, without matrix products in TF32."""
    wide = [state.detach().float().requires_grad_() for state in states]
    output = attend(attention.NAME, wide, spans)
    return [output.detach(), *torch.autograd.grad(output, wide, gradient.float())]


def measure(name: str, states: Tensors, gradient: torch.Tensor, spans: RowSpans, repeats: int) -> dict[str, object]:
    """Seconds and, beside the exact values, errors of one kernel."""
    forward, both = [], []
    for _ in range(repeats + 3):  # the first ones compile
        torch.cuda.synchronize()
        start = time.perf_counter()
        output = attend(name, states, spans)
        torch.cuda.synchronize()
        middle = time.perf_counter()
        gradients = torch.autograd.grad(output, states, gradient)
        torch.cuda.synchronize()
        forward.append(middle - start)
        both.append(time.perf_counter() - start)
    found = zip((output, *gradients), exact(states, gradient, spans), strict=True)
    errors = [((one.detach().float() - other).square().mean() / other.square().mean()).sqrt().item() for one, other in found]
    return {
        "forward_seconds": statistics.median(forward[3:]),
        "forward_and_backward_seconds": statistics.median(both[3:]),
        "relative_error": dict(zip(("output", "query", "key", "value"), errors, strict=True)),
    }


@contextmanager
def release(module: str) -> Iterator[None]:
    """Only this release of flash-attn is looked for."""
    looked_for = attention.FLASH_MODULES
    attention.FLASH_MODULES = (module,)
    attention.flash_attention.cache_clear()
    try:
        attention.implementation("flash_attn", CUDA, torch.bfloat16)
        yield
    finally:
        attention.FLASH_MODULES = looked_for
        attention.flash_attention.cache_clear()


def versions() -> dict[str, str]:
    """Of the releases that are here, or why they are not."""
    found = {}
    for module in attention.FLASH_MODULES:
        try:
            found[module] = str(getattr(importlib.import_module(module), "__version__", "installed"))
        except ImportError as error:
            found[module] = f"not here: {error}"
    return found


def main() -> None:
    """Measure all shapes and kernels, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    results: dict[str, dict[str, object]] = {}
    for title, rows in SHAPES.items():
        drawn = draw(rows)
        results[title] = {"torch": measure(attention.NAME, *drawn, options.repeats)}
        for module in attention.FLASH_MODULES:
            try:
                with release(module):
                    results[title][module] = measure(attention.FLASH_NAME, *drawn, options.repeats)
            except (ModelError, RuntimeError) as error:
                results[title][module] = f"{type(error).__name__}: {str(error)[:300]}"
    written = {**circumstances(command("benchmarks.attention"), "cuda"), "releases": versions(), "results": results}
    text = json.dumps(written, indent=2)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"attention_{torch.cuda.get_device_name().split()[-1].lower()}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
