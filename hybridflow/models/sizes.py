"""The sizes of a model, from its shapes alone: nothing is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from hybridflow.models.attention import NAME
from hybridflow.models.build import decoder_layers
from hybridflow.models.load import ModelSource, load_causal_lm, output_layer
from hybridflow.models.lora import Adapters, add_adapters
from hybridflow.planner.sizes import ModelSize


def model_size(path: str, *, adapters: Adapters | None = None, trust_remote_code: bool = False) -> ModelSize:
    """The sizes of the causal language model in folder `path`, or of that name on the hub, trained with `adapters` or whole.

    Raises:
        ModelError: there is none, or it cannot be trained here.
    """
    source = ModelSource(path=path, attention=NAME, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model = load_causal_lm(source, is_skeleton=True)
    parameters = _count(model.parameters())
    layers = [_count(layer.parameters()) for layer in decoder_layers(model)]
    if adapters is not None:
        add_adapters(model, adapters)
    config = model.config.get_text_config()
    head, embeddings = output_layer(model), model.get_input_embeddings()
    settings = config.to_dict()
    num_heads = config.num_attention_heads
    head_channels = settings.get("head_dim") or config.hidden_size // num_heads
    return ModelSize(
        parameters=parameters,
        trained_parameters=_count(parameter for parameter in model.parameters() if parameter.requires_grad),
        output_parameters=0 if head.weight is embeddings.weight else _count(head.parameters()),
        layer_parameters=max(layers),
        layers_parameters=sum(layers),
        num_layers=len(layers),
        hidden=config.hidden_size,
        attention=num_heads * head_channels,
        key_value=(settings.get("num_key_value_heads") or num_heads) * head_channels,
        feed_forward=_feed_forward(settings, config.hidden_size),
        vocabulary=head.out_features,
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _feed_forward(settings: Mapping[str, object], hidden: int) -> int:
    """Channels that one token passes. Families of models name them differently; without a name four times the hidden ones."""

    def number(*names: str) -> int:
        return next((found for name in names if isinstance(found := settings.get(name), int) and found), 0)

    dense = number("intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    experts = number("num_experts_per_tok", "num_experts_per_token")
    if not experts:
        return dense
    return experts * (number("moe_intermediate_size") or dense) + number("shared_expert_intermediate_size")
