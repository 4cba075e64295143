"""Model FLOPs utilisation: what an update had to compute, over what the GPU could have computed in its time."""

from __future__ import annotations

import torch
from torch import nn

from hybridflow.metrics import Metric

PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 operations per second by part of the device's name, from NVIDIA's data sheets; the first match counts."""


def peak_flops(device: torch.device) -> float | None:
    """Operations per second of a device; None where they are not known, as of any CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(model: nn.Module) -> float:
    """Of a forward and a backward pass: 6 per trained weight and 4 per frozen one (Kaplan et al. 2020, arXiv:2001.08361,
    sec. 2.1). Attention between tokens and recomputed activations are not counted."""
    return float(sum((6 if weight.requires_grad else 4) * weight.numel() for weight in model.parameters()))


def utilisation(flops: float, seconds: float, peak: float) -> Metric:
    """The share of `peak` that was used; merged, it is the share over all ranks and updates."""
    return Metric(flops, peak * seconds)
