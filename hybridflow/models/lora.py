"""Low-rank adapters on the linear layers of a model. Hu et al. 2021, arXiv:2106.09685, eq. 3, by peft.

Engines and exports get plain weights, so an adapter that cannot be merged would train for nothing: such layers are refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from transformers import PreTrainedModel

from hybridflow.errors import ModelError
from hybridflow.models.load import output_layer

ADAPTER, BASE, FACTOR = "default", ".base_layer.", ".lora_"
"""What the names of an adapted layer's parameters have in them, as peft gives them."""
ALL_LINEAR = ("all-linear",)
NO_LORA = "It has no layer that takes adapters: set model.lora_rank=0, or use another model"


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Which adapters a model gets."""

    rank: int
    alpha: float
    """The update is multiplied by alpha / rank."""
    targets: tuple[str, ...]
    """Names of layers, the last part or more of them; `all-linear` alone means all linear ones but the output layer."""
    seed: int
    """Of their random beginning, which changes no output: the other factor begins at zero."""


def add_adapters(model: PreTrainedModel, adapters: Adapters) -> None:
    """Put adapters into `model`, and freeze all else.

    Raises:
        ModelError: peft is not installed, no layer has one of the names, or a layer is meant whose adapter cannot be merged.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ModelError("model.lora_rank > 0 needs peft, which is not installed: pip install peft") from error
    choice = _Choice(model, adapters.targets)
    choice.check_names()
    settings = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # peft computes with any number
        target_modules="all-linear" if adapters.targets == ALL_LINEAR else list(adapters.targets),
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
    # What peft adapts is not always what was named: of mixtures of experts it takes the experts' stacked parameters too.
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    choice.refuse(name for name, layer in adapted.items() if type(layer) is not Linear or name not in choice.adaptable)
    forgotten = choice.meant - adapted.keys()
    assert not forgotten, f"peft put no adapters on {sorted(forgotten)}"


class _Choice:
    """What the targets mean in a model that has no adapters yet."""

    def __init__(self, model: PreTrainedModel, targets: tuple[str, ...]):
        self.model_name, self.targets = type(model).__name__, targets
        self.kinds = {name: type(layer).__name__ for name, layer in model.named_modules() if name}
        """Layer -> its class."""
        head = output_layer(model)
        self.head = next(name for name, layer in model.named_modules() if layer is head)
        self.adaptable = _adaptable(model, head)
        self.meant = set(self.adaptable if targets == ALL_LINEAR else filter(self._is_named, self.kinds))

    def _is_named(self, layer: str) -> bool:
        """As peft understands a list of names."""
        return any(_is_called(layer, target) for target in self.targets)

    def check_names(self) -> None:
        """Refuse names of no layer, and of layers whose adapters cannot be merged.

        Raises:
            ModelError: there are such names.
        """
        if self.targets == ALL_LINEAR:
            return
        unknown = [target for target in self.targets if not any(_is_called(layer, target) for layer in self.kinds)]
        if unknown or not self.targets:
            found = f"{unknown}, and {self.model_name} has no layers of these names" if unknown else "no layers"
            linear = sorted(_last_parts(self.adaptable))
            advice = (
                f"Name some of its linear layers, which are {linear}, or give {list(ALL_LINEAR)} alone" if linear else NO_LORA
            )
            raise ModelError(f"model.lora_targets={list(self.targets)} names {found}. {advice}")
        self.refuse(self.meant - self.adaptable)

    def refuse(self, layers: Iterable[str]) -> None:
        """Raise ModelError if there are any `layers`, and name them."""
        wrong = set(layers)
        if not wrong:
            return
        usable = sorted(_last_parts(self.meant & self.adaptable or self.adaptable) - _last_parts(wrong))
        advice = f"Set model.lora_targets={usable}" if usable else NO_LORA
        raise ModelError(
            f"model.lora_targets={list(self.targets)} means layers of {self.model_name} whose adapters cannot be merged into "
            f"what engines and exports get: {', '.join(sorted({self._described(layer) for layer in wrong}))}. Adapters fit "
            f"layers of class torch.nn.Linear with weights of their own, except the output layer. {advice}"
        )

    def _described(self, layer: str) -> str:
        """Name and class; layers that differ in their number only are one."""
        original = layer.partition(".base_layer")[0]  # peft wraps experts once for each stacked parameter
        kind = "the output layer" if original == self.head else self.kinds[original]
        return f"{re.sub(r'[.][0-9]+(?=[.])', '.*', original)} ({kind})"


def _adaptable(model: PreTrainedModel, head: nn.Module) -> set[str]:
    """The layers whose adapters can be merged.

    Not those of a subclass of Linear, which may compute differently; not the output layer, which is computed in chunks from
    its weight alone; none of which a part is used in another place too, where its adapter would be missing.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        name
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and layer is not head and uses[id(layer.weight)] == 1
    }


def _is_called(layer: str, target: str) -> bool:
    return layer == target or layer.endswith(f".{target}")


def _last_parts(layers: Iterable[str]) -> set[str]:
    return {layer.rpartition(".")[2] for layer in layers}


def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model with adapters, merged; of a sharded one every rank calls this."""
    from peft.tuners.lora import Linear

    scales = {layer.scaling[ADAPTER] for layer in model.modules() if isinstance(layer, Linear)}
    assert len(scales) == 1, f"adapters are scaled by {scales}, and add_adapters scales all by alpha / rank"
    return merge(dict(model.named_parameters()), scales.pop())


@torch.no_grad()
def merge(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Every weight under the name that it has without adapters; those of adapted layers, in float32, with their adapters added.

    `weights` have peft's names: `q_proj.base_layer.weight`, `q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight`,
    which are W, A and B, become `q_proj.weight`, which is W + scale B A.
    """
    merged: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name, weight in weights.items():
        if FACTOR in name:
            continue
        factors = factor_names(name)
        if BASE in name and factors[0] in weights:  # a layer's bias has no adapter
            low, high = (weights[factor].float() for factor in factors)
            if isinstance(low, DTensor):
                low = low.redistribute(placements=[Replicate()] * low.device_mesh.ndim)
            weight = weight.float() + scale * (high @ low)
            used.update(factors)
        merged[plain_name(name)] = weight
    lost = [name for name in weights if FACTOR in name and name not in used]
    assert not lost, f"{len(lost)} parameters of adapters were merged into no weight, among them {lost[0]}"
    return merged


def plain_name(name: str) -> str:
    """The name that a weight has in the model without adapters."""
    return name.replace(BASE, ".")


def factor_names(name: str) -> tuple[str, str]:
    """The names of A and B of the adapter that changes weight `name`, which has peft's name."""
    return name.replace(BASE, f".lora_A.{ADAPTER}."), name.replace(BASE, f".lora_B.{ADAPTER}.")
