"""What only the torch engine promises: any architecture of transformers, shared prompts, a bounded cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hybridflow.errors import EngineError, ModelError
from hybridflow.rollout.base import Request, Sampling
from hybridflow.rollout.slot_cache import PrefillAttention
from hybridflow.rollout.torch_engine import TorchEngine
from tests.toy import make_tiny_tokenizer
from tests.unit.test_engine_contract import prompts, requests, spec_of, tokens_of

GREEDY = Sampling(temperature=0.0, max_tokens=30)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), id="tied Llama"),
        pytest.param(lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32)), id="Qwen3 with wider heads"),
        pytest.param(lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)), id="Mistral with sliding window"),
        pytest.param(
            lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
            id="Qwen2 with one sliding layer of two",
        ),
    ],
)
def test_greedy_tokens_are_those_of_transformers(build: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(build(), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = prompts(8)
    for prompt, response in zip(asked, TorchEngine(spec_of(folder)).generate(requests(asked, GREEDY)), strict=True):
        ids = torch.from_numpy(prompt).long()[None]
        whole = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30)
        assert response.tokens.tolist() == whole[0, len(prompt) :].tolist()


def test_a_model_with_capped_scores_is_refused(tmp_path: Path) -> None:
    folder = saved(Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16)), tmp_path)
    with pytest.raises(ModelError, match="capped attention scores"):
        TorchEngine(spec_of(folder))


def test_responses_to_one_prompt_share_its_prefill(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TorchEngine(spec_of(tiny_model))
    prefilled: list[int] = []
    attend = PrefillAttention.attend
    monkeypatch.setattr(
        PrefillAttention, "attend", lambda step, asked: (prefilled.append(asked.key_1KTD.shape[2]), attend(step, asked))[1]
    )
    prompt, other = prompts(2)
    asked = [prompt] * 20 + [other] + [prompt] * 10
    responses = engine.generate(requests(asked, replace(GREEDY, temperature=1.0, ignore_eos=True)))
    assert prefilled == [len(prompt) + len(other)] * 2  # in each of two layers
    alone = engine.generate([replace(request, id=0) for request in requests(asked, replace(GREEDY, temperature=1.0))[7:8]])
    assert tokens_of(alone)[0] == tokens_of(responses)[7][: len(alone[0].tokens)]


def test_long_prompts_are_prefilled_in_parts(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(prompts(20, longest=60), GREEDY)
    whole = tokens_of(TorchEngine(spec_of(tiny_model)).generate(asked))
    monkeypatch.setattr("hybridflow.rollout.torch_engine.PREFILL_TOKENS", 100)
    assert tokens_of(TorchEngine(spec_of(tiny_model)).generate(asked)) == whole


def test_more_requests_than_slots_wait(tiny_model: str) -> None:
    asked = requests(prompts(40), replace(GREEDY, temperature=1.0))
    few = TorchEngine(spec_of(tiny_model, max_num_seqs=3))
    for request in asked:
        few.add(request)
    few.step()
    assert few.rows.count <= 3 and few.num_unfinished > 30
    while few.num_unfinished:
        few.step()
    many = TorchEngine(spec_of(tiny_model))
    assert tokens_of(few.generate(asked)) == tokens_of(many.generate(asked))


def test_a_bfloat16_engine_computes_in_bfloat16(tiny_model: str) -> None:
    engine = TorchEngine(spec_of(tiny_model, dtype="bfloat16"))
    (response,) = engine.generate(requests(prompts(1), GREEDY))
    assert {tensor.dtype for _, tensor in engine.named_parameters()} == {torch.bfloat16}
    assert {part.dtype for layer in engine.cache.layers.values() for part in layer} == {torch.bfloat16}
    assert response.log_probs is not None and response.log_probs.dtype == np.float32


def test_a_context_over_the_models_is_refused(tiny_model: str) -> None:
    with pytest.raises(EngineError, match=r"may have 600 tokens, but .* was made for 512"):
        TorchEngine(spec_of(tiny_model, max_model_tokens=600))


def test_weights_of_another_dtype_are_cast(tiny_model: str) -> None:
    engine = TorchEngine(spec_of(tiny_model))
    asked = requests(prompts(4), GREEDY)
    before = tokens_of(engine.generate(asked))
    engine.load_weights([(name, tensor.double()) for name, tensor in engine.named_parameters()])
    assert tokens_of(engine.generate(asked)) == before


def test_a_seed_may_be_any_integer(tiny_model: str) -> None:
    engine = TorchEngine(spec_of(tiny_model))
    sampling = Sampling(max_tokens=4)
    responses = engine.generate(
        [Request(id=i, prompt=prompts(1)[0], sampling=sampling, seed=seed) for i, seed in enumerate([-1, 2**70, 0])]
    )
    assert len(responses) == 3
