"""Model FLOPs utilisation: what an update had to compute, over what the GPU could have computed in its time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from hybridflow.models.heads import ValueModel
from hybridflow.models.load import output_layer
from hybridflow.models.policy import PolicyModel

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 operations per second by part of the device's name, from NVIDIA's data sheets; the first match counts."""


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of a device; None where they are not known, as of any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class FlopsPerToken:
    """Of a forward and a backward pass, for one token."""

    backbone: float
    """Of prompts and responses alike."""
    output: float
    """In the output layer, which only the positions before response tokens go through."""

    def of(self, num_tokens: float, num_response_tokens: float) -> float:
        """For so many tokens, prompts and responses, of which so many belong to responses."""
        return self.backbone * num_tokens + self.output * num_response_tokens


def flops_per_token(model: PolicyModel | ValueModel) -> FlopsPerToken:
    """6 per trained weight of a matrix product and 4 per frozen one (Kaplan et al. 2020, arXiv:2001.08361, sec. 2.1).

    Embeddings are looked up: they count only as the output layer that they are where weights are tied. Not counted are the
    products between tokens in attention and recomputed activations. Of a mixture of experts all experts count.
    """
    head = output_layer(model.causal_lm) if isinstance(model, PolicyModel) else model.value_head
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    elsewhere = {id(weight) for module in (head, *embeddings) for weight in module.parameters()}
    backbone = (weight for weight in model.parameters() if id(weight) not in elsewhere)
    return FlopsPerToken(backbone=_flops(backbone), output=_flops(head.parameters()))


def _flops(weights: Iterable[nn.Parameter]) -> float:
    return float(sum((6 if weight.requires_grad else 4) * weight.numel() for weight in weights if weight.ndim >= 2))
