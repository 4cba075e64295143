"""What vLLM is told on CUDA, seen without a GPU."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PretrainedConfig, Qwen2Config, Qwen3MoeConfig

from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import EngineSpec

pytest.importorskip("vllm", reason="vllm is not installed: its arguments are NOT tested on this machine")

from hybridflow.rollout import vllm_patches as patches
from hybridflow.rollout.vllm_arguments import capture_sizes, engine_arguments

pytestmark = pytest.mark.vllm
VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


def spec(folder: Path, device: str = "cuda") -> EngineSpec:
    return EngineSpec(
        model=str(folder),
        tokenizer=str(folder),
        dtype="bfloat16",
        max_model_tokens=64,
        max_num_seqs=1000,
        seed=0,
        seed_requests=True,
        device=torch.device(device),
        layout=Layout(),
        rank=0,
        gpu_memory_utilization=0.4,
        cpu_cache_gib=1.0,
        enforce_eager=False,
    )


def test_every_number_of_requests_that_can_run_at_once_has_a_cuda_graph(tmp_path: Path) -> None:
    found = engine_arguments(spec(tmp_path))["compilation_config"]
    assert found == {"cudagraph_capture_sizes": capture_sizes(1000)}
    few = engine_arguments(replace(spec(tmp_path), most_rows=100))["compilation_config"]
    assert few == {"cudagraph_capture_sizes": capture_sizes(100)}
    assert capture_sizes(1000)[-1] == 1000 and capture_sizes(1)[-1] == 1
    assert "compilation_config" not in engine_arguments(spec(tmp_path, "cpu"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Qwen2Config(), "1"),
        (LlamaConfig(), "1"),
        (MistralConfig(sliding_window=None), "1"),
        (MistralConfig(sliding_window=4096), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=64, max_window_layers=1), None),
        (MixtralConfig(), None),
        (Qwen3MoeConfig(), None),
    ],
)
def test_dense_models_of_full_attention_get_the_second_runner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, expected: str | None
) -> None:
    monkeypatch.setenv(VARIABLE, "x")  # so that it is put back
    monkeypatch.delenv(VARIABLE)
    config.save_pretrained(tmp_path)
    patches.take_second_runner(spec(tmp_path, "cpu"))
    assert VARIABLE not in os.environ
    patches.take_second_runner(spec(tmp_path))
    assert os.environ.get(VARIABLE) == expected


def test_who_has_decided_on_a_runner_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    Qwen2Config().save_pretrained(tmp_path)
    patches.take_second_runner(spec(tmp_path))
    assert os.environ[VARIABLE] == "0"
