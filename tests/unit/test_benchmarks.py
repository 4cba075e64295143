"""Benchmarks of one process: what they measure, and what they write to be repeated."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from benchmarks import generation, record
from hybridflow.rollout.base import Request, Sampling


def options_of(engine: str, device: str) -> argparse.Namespace:
    return argparse.Namespace(engine=engine, device=device)


class SilentEngine:
    """Answers nothing, and notes in which pass it was asked."""

    def __init__(self) -> None:
        self.current = "none"
        self.asked_in: list[str] = []

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        self.current = name
        yield
        self.current = "none"

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, asked: list[Request]) -> list[Request]:
        self.asked_in.append(self.current)
        return asked


def test_repetitions_of_passes_alternate_and_the_first_of_each_does_not_count() -> None:
    engine = SilentEngine()
    passes = {name: lambda name=name: engine.during(name) for name in ("one", "other")}
    asked = [Request(id=0, prompt=np.zeros(3, np.int32), sampling=Sampling(), seed=0)]
    seconds = generation.measure(engine, passes, asked, 2)  # type: ignore[arg-type]
    assert engine.asked_in == ["one", "other"] * 3
    assert {name: len(taken) for name, taken in seconds.items()} == {"one": 2, "other": 2}


def test_an_engine_that_always_heeds_seeds_has_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--shape", "tiny", "--engine", "torch", "--device", "cpu", "--requests", "2", "--tokens", "4"]
    arguments += ["--repeats", "2", "--folder", str(tmp_path / "a model"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["generation.py", *arguments])
    generation.main()
    result = json.loads((tmp_path / "generation_tiny_torch.json").read_text())
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"2 x 4, a seed each": 2}
    assert shlex.split(result["command"]) == ["python", "-m", "benchmarks.generation", *arguments]
    assert result["versions"]["transformers"] == version("transformers")


@pytest.mark.vllm
def test_vllm_has_passes_for_each_part_of_ours() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm.v1.sample.ops import topk_topp_sampler

    from hybridflow.rollout.vllm_engine import VllmEngine
    from hybridflow.rollout.vllm_patches import sample_row_by_row
    from hybridflow.rollout.vllm_scheduler import MultiStepScheduler

    engine = VllmEngine.__new__(VllmEngine)  # not started: only its seeds matter here
    engine.heeds_seeds = False  # as of the first model runner, started without seeds
    passes = generation.passes_of(engine, options_of("vllm", "cuda"))
    every_token = "a seed each, every token scheduled"
    assert list(passes) == ["a seed each", every_token, "no seeds", "a seed each, vLLM's sampling"]
    with passes[every_token]():
        assert MultiStepScheduler.max_steps == 1
    assert MultiStepScheduler.max_steps > 1
    with passes["a seed each"]():
        assert engine.heeds_seeds
    with passes["no seeds"]():
        assert not engine.heeds_seeds
    before = topk_topp_sampler.random_sample
    topk_topp_sampler.random_sample = ours = lambda *_: None
    try:
        with passes["a seed each, vLLM's sampling"]():
            assert engine.heeds_seeds
            assert topk_topp_sampler.random_sample is sample_row_by_row
        assert topk_topp_sampler.random_sample is ours
    finally:
        topk_topp_sampler.random_sample = before


@pytest.mark.vllm
def test_vllm_that_pays_nothing_for_seeds_has_no_pass_for_them() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    from hybridflow.rollout.vllm_engine import VllmEngine

    engine = VllmEngine.__new__(VllmEngine)
    engine.heeds_seeds = True  # although it was started without seeds
    passes = generation.passes_of(engine, options_of("vllm", "cuda"))
    assert list(passes) == ["a seed each", "a seed each, every token scheduled"]


def test_several_ranks_are_repeated_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reshard.py", "--folder", "a b"])
    assert record.command("benchmarks.reshard", num_ranks=4) == (
        "torchrun --nproc-per-node 4 -m benchmarks.reshard --folder 'a b'"
    )
