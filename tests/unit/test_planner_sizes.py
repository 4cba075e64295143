"""What one model takes, by hand-derived numbers, and the sizes read off its shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from hybridflow.config.schema import Config, ModelConfig, RolloutConfig, TrainingConfig
from hybridflow.errors import ModelError
from hybridflow.models.sizes import model_size
from hybridflow.planner.sizes import ModelNeeds, ModelSize, Numerics
from hybridflow.workers.hardware import model_sizes
from tests.toy import make_tiny_model

SIZE = ModelSize(
    parameters=1000,
    trained_parameters=1000,
    output_parameters=100,
    layer_parameters=200,
    layers_parameters=800,
    num_layers=4,
    hidden=10,
    attention=10,
    key_value=10,
    feed_forward=30,
    vocabulary=10,
)
ACTOR = ModelNeeds(
    role="actor",
    size=SIZE,
    num_ranks=1,
    is_trained=True,
    has_output_layer=True,
    tokens=100,
    numerics=Numerics(is_compiled=True, chunk_tokens=50),
)


def test_a_trained_model_takes_sixteen_bytes_per_parameter_while_it_learns() -> None:
    assert (ACTOR.weights, ACTOR.optimizer, ACTOR.gradients(are_sharded=False)) == (4000, 8000, 4000)


def test_ranks_share_weights_and_optimizer_but_not_the_gradients_of_earlier_microbatches() -> None:
    on_four = replace(ACTOR, num_ranks=4)
    assert (on_four.weights, on_four.optimizer, on_four.gradients(are_sharded=False)) == (1000, 2000, 4000)


def test_gradients_that_are_cut_with_every_microbatch_are_a_share_and_two_whole_layers() -> None:
    on_four = replace(ACTOR, num_ranks=4)
    assert on_four.gradients(are_sharded=True) == 4000 // 4 + 2 * 200 * 4


def test_several_ranks_gather_what_is_outside_the_layers_and_three_layers() -> None:
    assert ACTOR.gathered == 1000 * 2
    assert replace(ACTOR, num_ranks=4).gathered == (200 + 3 * 200) * 2


def test_a_frozen_model_has_weights_only_in_the_compute_dtype() -> None:
    frozen = replace(ACTOR, is_trained=False)
    assert (frozen.weights, frozen.optimizer, frozen.gradients(are_sharded=False)) == (2000, 0, 0)


def test_a_value_model_is_without_output_layer_and_logits() -> None:
    critic = replace(ACTOR, has_output_layer=False)
    assert critic.weights == 4 * 900
    # gathered 1,800; then one layer's widest moment without gradients: 100 tokens x 2 bytes x (3 x 30 + 6 x 10)
    assert critic.forward() == 1800 + 100 * 2 * 150


def test_adapters_alone_have_optimizer_and_gradients() -> None:
    adapted = replace(ACTOR, size=replace(SIZE, trained_parameters=50))
    assert (adapted.weights, adapted.optimizer, adapted.gradients(are_sharded=False)) == (4000, 400, 200)


def test_backward_begins_with_the_activations_of_all_layers_and_a_chunk_of_logits() -> None:
    per_layer = 2 * (4 * 10 + 4 * 10 + 3 * 30) * 100  # bytes x channels x tokens, of a compiled layer
    # Logits: 50 tokens x 10 x 10 bytes and the head's gradient, 10 x 10 x 4; gradients of one layer are larger: 2 x 90 x 100.
    assert ACTOR.backward(is_checkpointed=False) == 2000 + 4 * per_layer + 18000


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer() -> None:
    per_layer = 2 * (4 * 10 + 4 * 10 + 3 * 30) * 100
    assert ACTOR.backward(is_checkpointed=True) == 2000 + 4 * 100 * 2 * 10 + per_layer + 18000


def test_eager_activations_cover_what_autograd_saves_of_a_layer() -> None:
    sizes: dict[int, int] = {}
    for layers in (1, 2):
        config = Qwen2Config(
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=32,
            attn_implementation="sdpa",
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).base_model  # type: ignore[no-untyped-call]
        sizes[layers] = saved_bytes(model, num_tokens=128)
    size = replace(SIZE, num_layers=1, hidden=64, attention=64, feed_forward=256, vocabulary=1)
    eager = replace(ACTOR, size=size, tokens=128, numerics=Numerics(), has_output_layer=False)
    estimated = eager.backward(is_checkpointed=False) - eager.gathered - 128 * 2 * 3 * 256
    assert 1.2 < estimated / (sizes[2] - sizes[1]) < 1.3  # EAGER_EXCESS above it


def saved_bytes(model: torch.nn.Module, *, num_tokens: int) -> int:
    """What autograd keeps for the backward pass, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.zeros(1, num_tokens, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def test_the_sizes_of_a_model_are_those_of_the_loaded_one(tiny_model: str) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model)
    size = model_size(tiny_model)
    assert size.parameters == size.trained_parameters == sum(weight.numel() for weight in loaded.parameters())
    assert size.output_parameters == loaded.lm_head.weight.numel()
    assert size.layers_parameters == 2 * size.layer_parameters == sum(w.numel() for w in loaded.model.layers.parameters())
    assert (size.num_layers, size.hidden, size.attention, size.feed_forward) == (2, 64, 64, 128)
    assert size.key_value == loaded.model.layers[0].self_attn.k_proj.out_features


def test_tied_embeddings_count_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    tied = model_size(make_tiny_model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True))
    assert tied.output_parameters == 0
    assert tied.parameters - tied.layers_parameters == tied.vocabulary * 64 + 64  # embeddings and the last norm


def test_sizes_are_by_role_with_adapters_on_trained_models_only(
    tiny_model: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pytest.importorskip("peft")
    larger = make_tiny_model(tmp_path_factory.mktemp("larger"), num_hidden_layers=3)
    config = Config(
        model=ModelConfig(path=tiny_model, lora_rank=4), critic=TrainingConfig(path=larger), rollout=RolloutConfig()
    )
    sizes = model_sizes(config, frozenset({"actor", "critic", "reference", "rollout", "reward"}))
    assert sizes.keys() == {"actor", "critic", "reference", "rollout"}
    assert {role: size.num_layers for role, size in sizes.items()} == {"actor": 2, "critic": 3, "reference": 2, "rollout": 2}
    # Rank 4 on seven matrices of each of two layers: 4 x (inputs + outputs). q and o: 64 + 64, k and v: 64 + 32, gate and up:
    # 64 + 128, down: 128 + 64.
    assert sizes["actor"].trained_parameters == 2 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    assert sizes["reference"].trained_parameters == sizes["reference"].parameters


def test_a_model_that_is_not_there_is_told() -> None:
    with pytest.raises(ModelError, match="no such folder"):
        model_size("/nowhere/model")
