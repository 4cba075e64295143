"""Every causal language model of transformers that a small configuration makes is computed rightly, or refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hybridflow.batch import Ragged
from hybridflow.errors import EngineError, ModelError
from hybridflow.models.attention import NAME
from hybridflow.models.build import ModelSpec, build_policy, build_value_model
from hybridflow.models.load import ModelSource
from hybridflow.models.packing import pack
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import EngineSpec, Request, Sampling
from hybridflow.rollout.torch_engine import TorchEngine
from tests.every_model import VOCABULARY, WINDOW, make_every, model_types, own_log_probs
from tests.unit.test_engine_contract import spec_of as engine_spec

CPU = torch.device("cpu")
LENGTHS = ((3, 30), (1, 90), (60, 1), (9, 9))
"""Prompt and response tokens, up to what layers with a window see."""
BEYOND_WINDOW = (WINDOW + 30, 10)


def trained_spec(path: str, *, max_row_tokens: int) -> ModelSpec:
    source = ModelSource(path=path, attention=NAME, dtype=torch.float32, max_row_tokens=max_row_tokens)
    return ModelSpec(source=source, layout=Layout(), device=CPU, compute_dtype=torch.float32, chunk_tokens=50)


def generating_spec(path: str, *, max_row_tokens: int) -> EngineSpec:
    return replace(engine_spec(path), max_model_tokens=max_row_tokens)


def texts(lengths: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(4, VOCABULARY, length, dtype=np.int32) for length in lengths]


def trained_difference(path: str, lengths: tuple[tuple[int, int], ...], own: PreTrainedModel) -> float:
    """The largest, of log-probabilities in training. The backward pass runs too."""
    policy = build_policy(trained_spec(path, max_row_tokens=max(map(sum, lengths)))).train()
    prompts, responses = texts(tuple(n for n, _ in lengths)), texts(tuple(n for _, n in lengths))
    packed = pack(Ragged.from_rows(prompts, np.int32), Ragged.from_rows(responses, np.int32), CPU)
    found, _ = policy(packed)
    found.sum().backward()
    expected = torch.cat([own_log_probs(own, *row) for row in zip(prompts, responses, strict=True)])
    return float((found - expected).detach().abs().max())


def generated_difference(path: str, lengths: tuple[tuple[int, int], ...], own: PreTrainedModel) -> float:
    """The largest, of log-probabilities that the torch engine gives."""
    engine = TorchEngine(generating_spec(path, max_row_tokens=max(map(sum, lengths))))
    prompts = texts(tuple(n for n, _ in lengths))
    requests = [
        Request(id=i, prompt=prompt, sampling=Sampling(max_tokens=response, ignore_eos=True), seed=i)
        for i, (prompt, (_, response)) in enumerate(zip(prompts, lengths, strict=True))
    ]
    rows = [(request.prompt, response) for request, response in zip(requests, engine.generate(requests), strict=True)]
    return max(float(np.abs(own_log_probs(own, p, r.tokens).numpy() - r.log_probs).max()) for p, r in rows)


@pytest.mark.slow
@pytest.mark.parametrize("difference_of", [trained_difference, generated_difference])
@pytest.mark.parametrize("lengths", [LENGTHS, (*LENGTHS, BEYOND_WINDOW)], ids=["within windows", "beyond windows"])
@pytest.mark.parametrize("model_type", model_types())
def test_a_model_is_computed_as_transformers_does_or_refused_in_one_line(
    model_type: str, lengths: tuple[tuple[int, int], ...], difference_of: object, tmp_path: Path
) -> None:
    path = make_every(model_type, tmp_path)
    if path is None:
        pytest.skip("transformers makes none from a small configuration")
    try:
        own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        context = torch.no_grad() if difference_of is generated_difference else torch.enable_grad()
        with context:
            difference = difference_of(path, lengths, own)
    except (ModelError, EngineError) as refusal:
        assert len(str(refusal).splitlines()) == 1
        pytest.skip(str(refusal))
    assert difference < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model_type", model_types())
def test_a_critic_of_any_model_is_built_or_refused_in_one_line(model_type: str, tmp_path: Path) -> None:
    path = make_every(model_type, tmp_path)
    if path is None:
        pytest.skip("transformers makes none from a small configuration")
    try:
        build_value_model(trained_spec(path, max_row_tokens=WINDOW))
    except ModelError as refusal:
        assert len(str(refusal).splitlines()) == 1
        pytest.skip(str(refusal))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe", "mixtral", "deepseek_v3", "gpt2"])
def test_known_models_train_and_generate(model_type: str, tmp_path: Path) -> None:
    path = make_every(model_type, tmp_path)
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    assert trained_difference(path, LENGTHS, own) < 1e-4
    with torch.no_grad():
        assert generated_difference(path, LENGTHS, own) < 1e-4


@pytest.mark.parametrize("model_type", ["mamba", "lfm2", "qwen3_5_text", "nanochat"])
def test_a_model_that_would_be_trained_wrongly_is_refused_with_the_number(model_type: str, tmp_path: Path) -> None:
    path = make_every(model_type, tmp_path)
    with pytest.raises(ModelError, match=r"something else than transformers does.*0[.]\d+ of difference on average"):
        build_policy(trained_spec(path, max_row_tokens=WINDOW))


def test_a_model_that_the_torch_engine_would_generate_with_wrongly_is_refused_with_the_number(tmp_path: Path) -> None:
    path = make_every("diffllama", tmp_path)
    with pytest.raises(EngineError, match=r"differ from transformers' own by [\d.]+ nats on average"):
        TorchEngine(generating_spec(path, max_row_tokens=WINDOW))


def test_attention_that_knows_no_rows_and_scores_that_it_would_ignore_are_told(tmp_path: Path) -> None:
    for model_type, told in (
        ("nemotron", "does not pass keyword arguments"),
        ("gptj", "AttentionInterface"),
        ("gemma2", "softcap"),
    ):
        path = make_every(model_type, tmp_path / model_type)
        with pytest.raises(ModelError, match=told):
            build_policy(trained_spec(path, max_row_tokens=WINDOW))
