"""Low-rank adapters on the linear layers of a model. Hu et al. 2021, arXiv:2106.09685, eq. 3, by peft."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from hybridflow.errors import ModelError

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which adapters a model gets."""

    rank: int
    alpha: float
    """The update is multiplied by alpha / rank."""
    targets: tuple[str, ...]
    """Names of layers; `all-linear` alone means all but the output layer."""
    seed: int
    """Of their random beginning, which changes no output: the other factor begins at zero."""


def add_adapters(model: PreTrainedModel, adapters: Adapters) -> None:
    """Put adapters into `model`, and freeze all else.

    Raises:
        ModelError: peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError("model.lora_rank > 0 needs peft, which is not installed: pip install peft") from error
    targets = "all-linear" if adapters.targets == ("all-linear",) else list(adapters.targets)
    settings = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # peft computes with any number
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(adapters.seed)
        try:
            inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
        except ValueError as error:
            raise ModelError(
                f"model.lora_targets={list(adapters.targets)} does not fit {type(model).__name__}: {error}"
            ) from error


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the adapted layers with their adapters added, by the name the weight has without adapters."""
    from peft.tuners.lora import Linear

    merged = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            low, high = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            assert isinstance(low, torch.Tensor) and isinstance(high, torch.Tensor)
            if isinstance(low, DTensor):
                low = low.redistribute(placements=[Replicate()] * low.device_mesh.ndim)
            merged[f"{name}.weight"] = layer.base_layer.weight + layer.scaling[ADAPTER] * (high @ low)
    return merged
