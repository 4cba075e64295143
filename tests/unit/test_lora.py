"""Adapters on layers where they would be lost are refused, and none is left out of the merge."""

from __future__ import annotations

import re

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from hybridflow.errors import ModelError
from hybridflow.models.lora import Adapters, add_adapters, merged_weights

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN = Qwen2Config(**SMALL, num_key_value_heads=2)
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
MIXTURES = {
    "qwen": Qwen3MoeConfig(**SMALL, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4),
    "mixtral": MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4),
}
QWEN_LAYERS = "['down_proj', 'gate_proj', 'k_proj', 'o_proj', 'q_proj', 'up_proj', 'v_proj']"


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def adapt(model: PreTrainedModel, *targets: str) -> PreTrainedModel:
    add_adapters(model, Adapters(rank=2, alpha=4.0, targets=targets, seed=0))
    return model


def adapted_names(model: PreTrainedModel) -> set[str]:
    """The last part of the name of each layer with an adapter."""
    return {re.findall(r"([a-z_0-9]+)\.lora_", name)[0] for name, _ in model.named_parameters() if ".lora_" in name}


def refusal(config: PretrainedConfig, *targets: str) -> str:
    with pytest.raises(ModelError) as refused:
        adapt(model_of(config), *targets)
    return str(refused.value)


def test_all_linear_is_every_linear_layer_but_the_output_layer() -> None:
    names = adapted_names(adapt(model_of(QWEN), "all-linear"))
    assert str(sorted(names)) == QWEN_LAYERS


def test_an_embedding_is_refused_and_the_other_targets_are_proposed() -> None:
    message = refusal(QWEN, "embed_tokens", "q_proj")
    assert message.startswith("model.lora_targets=['embed_tokens', 'q_proj'] means layers of Qwen2ForCausalLM whose adapters")
    assert "model.embed_tokens (Embedding)." in message
    assert message.endswith("Set model.lora_targets=['q_proj']")


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_output_layer_is_refused_and_the_linear_layers_are_proposed(is_tied: bool) -> None:
    message = refusal(Qwen2Config(**QWEN.to_diff_dict() | {"tie_word_embeddings": is_tied}), "lm_head")
    assert "lm_head (the output layer)." in message
    assert message.endswith(f"Set model.lora_targets={QWEN_LAYERS}")


@pytest.mark.parametrize("layer", ["norm", "mlp", "self_attn"])
def test_layers_that_peft_does_not_know_are_refused_in_one_line(layer: str) -> None:
    message = refusal(QWEN, layer)
    assert f".{layer} (Qwen2" in message and "\n" not in message


def test_gpt2_is_refused_by_each_kind_of_layer_that_all_linear_means_there() -> None:
    message = refusal(GPT2, "all-linear")
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert f"transformer.h.*.{layer} (Conv1D)" in message
    assert message.endswith("set model.lora_rank=0, or use another model")


def test_a_square_transposed_layer_is_refused_although_its_shapes_fit() -> None:
    assert "transformer.h.*.attn.c_proj (Conv1D)." in refusal(GPT2, "attn.c_proj")


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_peft_adapts_unasked_are_refused_and_the_advice_works(name: str) -> None:
    message = refusal(MIXTURES[name], "all-linear")
    assert re.search(r"model\.layers\.\*\.mlp\.experts \(\w+Experts\), model\.layers\.\*\.mlp\.gate \(\w+Router\)\.", message)
    assert message.endswith("Set model.lora_targets=['k_proj', 'o_proj', 'q_proj', 'v_proj']")
    names = adapted_names(adapt(model_of(MIXTURES[name]), "k_proj", "o_proj", "q_proj", "v_proj"))
    assert names == {"k_proj", "o_proj", "q_proj", "v_proj"}


def test_a_name_of_no_layer_is_refused_though_others_fit() -> None:
    message = refusal(QWEN, "q_proj", "kproj")
    assert "names ['kproj'], and Qwen2ForCausalLM has no layers of these names" in message and QWEN_LAYERS in message


def test_a_name_of_no_layer_of_a_model_that_takes_no_adapters_proposes_none() -> None:
    message = refusal(GPT2, "q_proj")
    assert message.endswith("of these names. It has no layer that takes adapters: set model.lora_rank=0, or use another model")


def test_all_linear_stands_alone() -> None:
    assert "names ['all-linear'], and" in refusal(QWEN, "all-linear", "q_proj")


def test_no_targets_are_refused() -> None:
    assert "model.lora_targets=[] names no layers. Name some of" in refusal(QWEN)


def test_a_part_of_a_layers_name_is_no_name_but_its_path_is() -> None:
    assert "names ['proj']" in refusal(QWEN, "proj")
    assert len(adapt(model_of(QWEN), "layers.1.self_attn.q_proj").model.layers[1].self_attn.q_proj.lora_A) == 1


def test_a_linear_layer_that_may_compute_differently_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = model_of(QWEN)
    model.model.layers[1].self_attn.q_proj = Doubled(32, 32)
    with pytest.raises(ModelError, match=r"model\.layers\.\*\.self_attn\.q_proj \(Doubled\)"):
        adapt(model, "all-linear")


def test_a_layer_whose_weight_another_one_uses_is_refused() -> None:
    model = model_of(QWEN)
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    with pytest.raises(ModelError, match=r"up_proj \(Linear\)\. Adapters fit .* with weights of their own"):
        adapt(model, "up_proj")


def test_merged_weights_are_those_that_peft_merges() -> None:
    model = adapt(model_of(QWEN), "all-linear")
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter.data, std=0.1)
    found = {name: weight.clone() for name, weight in merged_weights(model).items()}  # peft merges in place
    assert list(found) == [name for name, _ in model_of(QWEN).named_parameters()]
    for layer in model.modules():
        if hasattr(layer, "merge"):
            layer.merge()
    expected = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters() if ".lora_" not in name}
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7, msg=name)


def test_a_parameter_of_an_adapter_that_no_weight_takes_up_stops_the_merge() -> None:
    model = adapt(model_of(QWEN), "q_proj")
    model.model.embed_tokens.lora_embedding_A = nn.ParameterDict({"default": nn.Parameter(torch.zeros(2, 64))})
    with pytest.raises(AssertionError, match=r"1 parameters of adapters .* model\.embed_tokens\.lora_embedding_A\.default"):
        merged_weights(model)


def test_a_layer_that_peft_passes_over_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda settings, model, adapter_name: model)
    with pytest.raises(AssertionError, match=r"peft put no adapters on \['model\.layers\.0\.self_attn\.q_proj'"):
        adapt(model_of(QWEN), "q_proj")
