"""Matrix products of the decoder layers in float8, by torchao.

Each token and each output channel has a scale of its own ("rowwise"), so that a row gives the same numbers whatever it is
packed with. Gradients of weights are computed in the layers' own dtype. Weights stay what they are: they are rounded where they
are multiplied, so that checkpoints, exports and weight syncs know nothing of float8.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning", arXiv:2209.05433; torchao's recipe `rowwise_with_gw_hp`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from hybridflow.errors import ModelError

CAPABILITY = (8, 9)
"""The first CUDA devices with float8 products: Ada, Hopper and what came after."""
MULTIPLE = 16
"""Both sides of a weight have to be divisible by this for the kernels."""
RECIPE = "rowwise_with_gw_hp"


def convert(layers: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Let the linear parts of `layers` multiply in float8; those whose sides the kernels cannot take stay as they are.

    A CPU has no such products: there numbers are rounded likewise and multiplied in `dtype`, that of the layers.

    Raises:
        ModelError: the GPU has no float8, its products would not give `dtype`, or no part of the layers can use it.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if device.type == "cuda" and torch.cuda.get_device_capability(device) < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ModelError(f"model.float8 needs a GPU of compute capability 8.9 or more, as Ada and Hopper; found {name}")
    if device.type == "cuda" and dtype is not torch.bfloat16:
        raise ModelError(f"model.float8: scaled products on a GPU give bfloat16, not {dtype}. Set model.compute_dtype=bfloat16")
    config = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=device.type == "cpu")
    converted = 0
    for layer in layers:
        convert_to_float8_training(layer, config=config, module_filter_fn=lambda part, _: _fits(part))
        converted += sum(_fits(part) for part in layer.modules())
    if not converted:
        raise ModelError(
            f"model.float8: no linear part of the decoder layers has sides divisible by {MULTIPLE}; it would change nothing. "
            "Set it to false"
        )


def _fits(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) and part.in_features % MULTIPLE == 0 and part.out_features % MULTIPLE == 0
