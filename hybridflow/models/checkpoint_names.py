"""The names that weights have in Hugging Face folders, where the model of transformers has others: of mixtures of experts a
folder has a tensor for each expert, and the model one for all experts of a layer. Engines and exports get those of folders.

The rules are transformers' own, by which it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key, revert_weight_conversion


class CheckpointNames:
    """What the weights of a model are called in a folder. Example: with Mixtral `model.layers.0.mlp.experts.down_proj` of shape
    [8, H, I] becomes `model.layers.0.block_sparse_moe.experts.0.w2.weight` to `...7.w2.weight` of shape [H, I]."""

    def __init__(self, model: PreTrainedModel):
        """`model` may be a skeleton."""
        self.model = model

    @cached_property
    def differ(self) -> bool:
        """Whether any weight has another name, or is split."""
        names = [name for name, _ in self.model.named_parameters()]
        return any(self.group_of(name) != name for name in names)

    @cached_property
    def _reverse(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        rules = [rule.reverse_transform() for rule in reversed(get_model_conversion_mapping(self.model, add_legacy=False))]
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]

    def group_of(self, name: str) -> str:
        """Weights of the same group become tensors of a folder together."""
        return rename_source_key(name, *self._reverse, reverse=True)[0]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """`names` in their order, those of a group together."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.group_of(name) if self.differ else name, []).append(name)
        return list(found.values())

    def convert(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole groups, under the names and in the shapes of a folder; views of what is given where that is possible."""
        if not self.differ:
            return dict(weights)
        converted: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(weights))
        return converted

    def stream(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights that come one by one, converted; a tensor of a group of several is copied until the others are there."""
        if not self.differ:
            yield from weights
            return
        sizes = {name: group for group in self.groups(name for name, _ in self.model.named_parameters()) for name in group}
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            group = sizes.get(name, [name])
            if len(group) == 1:
                yield from self.convert({name: tensor}).items()
                continue
            held = waiting.setdefault(group[0], {})
            held[name] = tensor.clone()
            if len(held) == len(group):
                yield from self.convert(waiting.pop(group[0])).items()
