"""Each patch of vLLM can be switched off, and a release without a private name is told and served in the public way."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed: its patches are NOT tested on this machine")

from hybridflow.rollout import vllm_patches as patches
from tests.toy import make_tiny_model
from tests.unit.test_engine_contract import LONG, prompts, requests, spec_of, tokens_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]
CUDA = torch.device("cuda")


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """vLLM's own parts, in their places."""
    from vllm.v1.sample.ops import topk_topp_sampler

    monkeypatch.setattr(topk_topp_sampler, "random_sample", patches.sample_row_by_row)
    monkeypatch.setattr(patches.LogprobsProcessor, "_update_sample_logprobs", patches.keep_all_log_probs)
    return SimpleNamespace(sampler=topk_topp_sampler, processor=patches.LogprobsProcessor)


def test_slow_parts_are_replaced_unless_switched_off(original: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(patches.SWITCH, "sample_at_once, keep_chosen_log_probs")
    patches.replace_slow_parts(CUDA)
    assert original.sampler.random_sample is patches.sample_row_by_row
    assert original.processor._update_sample_logprobs is patches.keep_all_log_probs
    monkeypatch.delenv(patches.SWITCH)
    patches.replace_slow_parts(CUDA)
    assert original.sampler.random_sample is patches.sample_at_once
    assert original.processor._update_sample_logprobs is patches.keep_chosen_log_probs


@pytest.mark.usefixtures("original")
def test_parts_that_a_release_has_not_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(patches, "sample_row_by_row", None)
    monkeypatch.setattr(patches, "keep_all_log_probs", None)
    with caplog.at_level(logging.WARNING, logger="hybridflow"):
        patches.replace_slow_parts(CUDA)
    assert "random_sample" in caplog.text and "_update_sample_logprobs" in caplog.text


def test_without_partial_outputs_interrupted_requests_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hybridflow.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(spec_of(make_tiny_model(tmp_path, hidden_size=128)))
    asked = requests(prompts(4), LONG)
    whole = tokens_of(engine.generate(asked))
    for request in asked:
        engine.add(request)
    for _ in range(10):
        engine.step()
    with monkeypatch.context() as changed, caplog.at_level(logging.WARNING, logger="hybridflow"):
        changed.delattr("vllm.v1.engine.output_processor.RequestState.make_request_output")
        partial = engine.interrupt()
    assert "make_request_output" in caplog.text
    assert [len(response.tokens) for response in partial] == [0] * 4
    assert tokens_of(engine.generate(asked)) == whole
    engine.close()
