"""Policies and value models against Hugging Face's own forward pass, one row at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PhiConfig,
    PhiForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from hybridflow.batch import Ragged
from hybridflow.errors import ModelError
from hybridflow.models.attention import NAME
from hybridflow.models.build import ModelSpec, build_policy, build_value_model, named_tensors
from hybridflow.models.load import ModelSource, load_causal_lm
from hybridflow.models.lora import Adapters
from hybridflow.models.packing import pack
from hybridflow.parallel.layout import Layout
from hybridflow.planner.decisions import resolved
from hybridflow.rollout.torch_engine import TorchEngine
from hybridflow.workers.model_spec import frozen_model, trained_model
from tests.toy import make_tiny_model
from tests.training_rows import context_of, random_batch, training_config
from tests.unit.test_engine_contract import spec_of as engine_spec

CPU = torch.device("cpu")
LENGTHS = [(3, 5), (1, 120), (50, 1), (9, 0), (9, 9), (2, 7)]


def spec_of(path: str, **options: object) -> ModelSpec:
    source = ModelSource(path=path, attention=NAME, dtype=torch.float32)
    return ModelSpec(source=source, layout=Layout(), device=CPU, compute_dtype=torch.float32, chunk_tokens=50, **options)


def rows() -> tuple[Ragged, Ragged]:
    batch = random_batch(LENGTHS)
    return batch.tokens("prompt"), batch.tokens("response")


def one_row_at_a_time(path: str, temperature: float) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    parts = []
    for prompt, response in zip(*rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        log_probs_TV = torch.log_softmax(model(ids[None]).logits[0] / temperature, -1)
        parts.append(log_probs_TV[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(parts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_log_probs_equal_hugging_face_one_row_at_a_time(tiny_model: str, temperature: float) -> None:
    policy = build_policy(spec_of(tiny_model))
    log_probs, _ = policy(pack(*rows(), CPU), temperature=temperature)
    torch.testing.assert_close(log_probs, one_row_at_a_time(tiny_model, temperature), rtol=0, atol=1e-5)


def test_other_architectures_work_too(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2)).save_pretrained(tmp_path)
    log_probs, _ = build_policy(spec_of(str(tmp_path)))(pack(*rows(), CPU))
    torch.testing.assert_close(log_probs, one_row_at_a_time(str(tmp_path), 1.0), rtol=0, atol=1e-5)


def test_tied_embeddings_stay_one_parameter_that_gets_both_gradients(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path, tie_word_embeddings=True)
    policy = build_policy(spec_of(path))
    log_probs, _ = policy(pack(*rows(), CPU))
    torch.testing.assert_close(log_probs, one_row_at_a_time(path, 1.0), rtol=0, atol=1e-5)
    log_probs.sum().backward()

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    names = [name for name, _ in named_tensors(policy)]
    assert names == [name for name, _ in model.named_parameters()]
    ids_1T = pack(*rows(), CPU).input_ids_1T
    start = 0
    for prompt, response in zip(*rows(), strict=True):  # the same sum of log-probabilities through Hugging Face
        ids = ids_1T[0, start : start + len(prompt) + len(response)]
        start += len(ids)
        log_probs_TV = torch.log_softmax(model(ids[None]).logits[0], -1)
        log_probs_TV[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).sum().backward()
    gradient = policy.causal_lm.get_input_embeddings().weight.grad.full_tensor()
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tiny_model: str) -> None:
    def gradients(**options: object) -> list[torch.Tensor]:
        policy = build_policy(spec_of(tiny_model, **options)).train()
        policy(pack(*rows(), CPU))[0].sum().backward()
        return [parameter.grad.full_tensor() for parameter in policy.parameters()]

    for kept, recomputed in zip(gradients(), gradients(gradient_checkpointing=True), strict=True):
        torch.testing.assert_close(kept, recomputed, rtol=0, atol=0)


def test_values_are_read_off_before_each_response_token(tiny_model: str) -> None:
    model = build_value_model(spec_of(tiny_model))
    weight = torch.linspace(-1, 1, 64)
    model.value_head.weight.data.to_local().copy_(weight[None])
    model.value_head.bias.data.to_local().fill_(0.25)
    values = model(pack(*rows(), CPU))

    backbone = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).base_model
    expected = []
    for prompt, response in zip(*rows(), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        hidden_TH = backbone(ids[None]).last_hidden_state[0]
        expected.append(hidden_TH[len(prompt) - 1 : len(ids) - 1] @ weight + 0.25)
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_a_new_value_model_expects_nothing(tiny_model: str) -> None:
    values = build_value_model(spec_of(tiny_model))(pack(*rows(), CPU))
    assert values.dtype == torch.float32
    assert not values.any()


def test_fresh_adapters_change_nothing_and_merge_to_the_weights_of_the_folder(tiny_model: str) -> None:
    plain = build_policy(spec_of(tiny_model))
    adapted = build_policy(spec_of(tiny_model, adapters=Adapters(rank=4, alpha=8.0, targets=("all-linear",), seed=0)))
    torch.testing.assert_close(adapted(pack(*rows(), CPU))[0], plain(pack(*rows(), CPU))[0], rtol=0, atol=1e-6)
    merged, expected = dict(named_tensors(adapted)), dict(named_tensors(plain))
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name].full_tensor(), tensor.full_tensor(), rtol=0, atol=0)


def test_merged_adapters_compute_what_adapters_compute(tiny_model: str, tmp_path: Path) -> None:
    adapted = build_policy(spec_of(tiny_model, adapters=Adapters(rank=4, alpha=8.0, targets=("q_proj", "up_proj"), seed=0)))
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter.data.to_local(), std=0.1)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.load_state_dict({name: tensor.full_tensor() for name, tensor in named_tensors(adapted)})
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(adapted(pack(*rows(), CPU))[0], one_row_at_a_time(str(tmp_path), 1.0), rtol=0, atol=1e-4)


def test_adapters_that_would_be_lost_are_refused_for_policies_and_value_models(tiny_model: str) -> None:
    for build in (build_policy, build_value_model):
        with pytest.raises(ModelError, match=r"lora_targets=\['lm_head'\] means layers of Qwen2ForCausalLM"):
            build(spec_of(tiny_model, adapters=Adapters(rank=4, alpha=8.0, targets=("lm_head",), seed=0)))


def load(path: str) -> None:
    load_causal_lm(ModelSource(path=path, attention=NAME, dtype=torch.float32))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere': no such folder"):
        load(str(tmp_path / "nowhere"))


def test_a_folder_without_a_model_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json in it"):
        load(str(tmp_path))


def test_a_folder_without_weights_is_refused(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    with pytest.raises(ModelError, match="does not load as a causal language model"):
        load(str(tmp_path))


QUERY = "model.layers.0.self_attn.q_proj.weight"


def without(*names: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        for name in names:
            weights.pop(name)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-300])


def with_settings(**settings: object) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return damage


DAMAGES = {
    "a weight is missing": (without(QUERY), f"lacks 1 weight.*random: {QUERY}"),
    "the output layer is missing": (without("lm_head.weight"), "lacks 1 weight.*random: lm_head.weight"),
    "a layer is missing": (with_settings(num_hidden_layers=3, layer_types=["full_attention"] * 3), "lacks 12 weight.*layers.2"),
    "another shape": (with_settings(intermediate_size=96), r"by which .* has \(64, 128\), not \(64, 96\)"),
    "cut off": (cut, "SafetensorError"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "SafetensorError"),
    "settings that contradict each other": (with_settings(num_hidden_layers=3), "must be equal to the number of `layer_types`"),
}


@pytest.mark.parametrize(("damage", "told"), DAMAGES.values(), ids=DAMAGES)
def test_files_that_are_not_the_whole_model_are_refused_by_trainer_and_engine_in_one_line(
    damage: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    make_tiny_model(tmp_path)
    damage(tmp_path)
    for build in (lambda: load(str(tmp_path)), lambda: TorchEngine(engine_spec(str(tmp_path)))):
        with pytest.raises(ModelError, match=told) as caught:
            build()
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_policy_needs_no_output_layer(tmp_path: Path) -> None:
    make_tiny_model(tmp_path)
    without("lm_head.weight")(tmp_path)
    build_value_model(spec_of(str(tmp_path)))


def test_the_bias_of_an_output_layer_is_not_needed_either(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    without("lm_head.weight", "lm_head.bias")(tmp_path)
    build_value_model(spec_of(str(tmp_path)))
    with pytest.raises(ModelError, match=r"lacks 2 weight.*lm_head\.bias, lm_head\.weight"):
        build_policy(spec_of(str(tmp_path)))


def test_weights_without_a_place_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tiny_model(tmp_path)
    with_settings(num_hidden_layers=1, layer_types=["full_attention"])(tmp_path)
    load(str(tmp_path))
    assert "12 weight(s) have no place in the model" in caplog.text and "model.layers.1." in caplog.text


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.5)).save_pretrained(tmp_path)
    model = load_causal_lm(ModelSource(path=str(tmp_path), attention=NAME, dtype=torch.float32))
    assert all(module.p == 0.0 for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_layers_that_would_be_computed_wrongly_are_refused(tmp_path: Path) -> None:
    config_file = Path(make_tiny_model(tmp_path)) / "config.json"
    settings = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(settings | {"layer_types": ["full_attention", "chunked_attention"]}))
    with pytest.raises(ModelError, match=r"does not compute on packed rows.*chunked_attention"):
        build_policy(spec_of(str(tmp_path)))


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN_WINDOW = {**SMALL, "use_sliding_window": True, "sliding_window": 96}


def build_skeleton(config: PretrainedConfig, folder: Path, *, max_row_tokens: int | None) -> None:
    """As a rank does that reads no weights."""
    config.save_pretrained(folder)
    source = ModelSource(path=str(folder), attention=NAME, dtype=torch.float32, max_row_tokens=max_row_tokens)
    load_causal_lm(source, is_skeleton=True)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=96), id="all layers"),
        pytest.param(Qwen2Config(**QWEN_WINDOW, max_window_layers=1), id="the second of two layers"),
        pytest.param(Qwen3MoeConfig(**QWEN_WINDOW, num_key_value_heads=2), id="all layers, switched on"),
    ],
)
def test_rows_longer_than_a_sliding_window_are_refused_when_the_model_is_built(
    tmp_path: Path, config: PretrainedConfig
) -> None:
    build_skeleton(config, tmp_path, max_row_tokens=96)
    build_skeleton(config, tmp_path, max_row_tokens=None)
    with pytest.raises(ModelError, match=r"the last 96 tokens only.*rows may have 97 tokens.*Lower these to 96 together"):
        build_skeleton(config, tmp_path, max_row_tokens=97)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=None), id="null"),
        pytest.param(LlamaConfig(**SMALL), id="no such setting"),
        pytest.param(Qwen2Config(**{**QWEN_WINDOW, "use_sliding_window": False}), id="switched off"),
        pytest.param(Qwen2MoeConfig(**{**QWEN_WINDOW, "use_sliding_window": False}), id="switched off, window 0"),
        pytest.param(Qwen2Config(**QWEN_WINDOW, max_window_layers=2), id="in no layer"),
    ],
)
def test_a_window_that_no_layer_has_refuses_nothing(tmp_path: Path, config: PretrainedConfig) -> None:
    build_skeleton(config, tmp_path, max_row_tokens=97)


def test_models_of_a_run_are_built_for_its_longest_rows(tiny_model: str) -> None:
    config = resolved(training_config(tiny_model))
    tokens = config.data.max_prompt_tokens + config.data.max_response_tokens
    for spec in (trained_model(config, context_of("actor"), None), frozen_model(config, context_of("reference"), None)):
        assert spec.source.max_row_tokens == tokens
