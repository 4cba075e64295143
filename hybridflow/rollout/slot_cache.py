"""The key-value cache of the torch engine, and the attention that reads and writes it.

Every request has a slot: a row of the cache, its tokens at their own positions from 0. The model sees a step as one
stream of tokens, [1, T], without padding; only attention knows which token belongs to which slot. It is plugged into
any Hugging Face model through transformers' public `AttentionInterface`, and is told about the step by a keyword
argument that the model passes down.

Legend: S slots, B rows of a step, H heads, K key-value heads, G = H / K, T tokens of the stream, P prompt tokens,
L tokens of the longest row, D head dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from hybridflow.errors import ModelError

ATTENTION = "hybridflow_slots"
"""Name under which `register` makes the attention known to transformers."""


class Layer(Protocol):
    """What the attention needs to know of the module that calls it."""

    layer_idx: int


@dataclass(frozen=True)
class AttentionInputs:
    """What a layer asks of attention."""

    layer: int
    query_1HTD: torch.Tensor
    key_1KTD: torch.Tensor
    value_1KTD: torch.Tensor
    scale: float | None
    """Multiplies the scores; None means 1 / sqrt(D)."""
    window: int | None
    """How many tokens back a query sees, its own included; None means all."""


class SlotCache:
    """Keys and values of all slots: for each layer two tensors [S, K, L, D], allocated when the layer first writes."""

    def __init__(self, num_slots: int, tokens_per_slot: int):
        self.num_slots, self.tokens_per_slot = num_slots, tokens_per_slot
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.windows: set[int | None] = set()
        """How many tokens back the layers that have asked see."""

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for layer in self.layers.values() for part in layer)

    def layer(self, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layer that asks, with heads, dtype and device like its own.

        Zeros, not `empty`: what is masked is multiplied by 0, which leaves no trace of numbers but would of NaNs.
        """
        if inputs.layer not in self.layers:
            self.windows.add(inputs.window)
            key, value = (
                part.new_zeros(self.num_slots, part.shape[1], self.tokens_per_slot, part.shape[3])
                for part in (inputs.key_1KTD, inputs.value_1KTD)
            )
            self.layers[inputs.layer] = key, value
        return self.layers[inputs.layer]

    def move(self, *, sources: torch.Tensor, targets: torch.Tensor, num_tokens: int) -> None:
        """Copy the first `num_tokens` tokens of the source slots over those of the target slots."""
        for layer in self.layers.values():
            for part in layer:
                part[targets, :, :num_tokens] = part[sources, :, :num_tokens]


class StepAttention(ABC):
    """Attention of the tokens of one step."""

    def __init__(self, cache: SlotCache):
        self.cache = cache
        self.masks: dict[int | None, torch.Tensor | None] = {}

    @abstractmethod
    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        """Write keys and values of the step's tokens, and return what its queries find: [1, T, H, D]."""

    def mask(self, window: int | None) -> torch.Tensor | None:
        """What a query may see, made once per step and kind of layer; `window` is how many tokens back, itself included."""
        if window not in self.masks:
            self.masks[window] = self.make_mask(window)
        return self.masks[window]

    @abstractmethod
    def make_mask(self, window: int | None) -> torch.Tensor | None:
        """The mask, True where a query may look."""


class PrefillAttention(StepAttention):
    """Whole prompts, one after the other in the stream; each goes to one or more slots."""

    def __init__(self, cache: SlotCache, lengths_B: torch.Tensor, *, prompt_of_slot: torch.Tensor, slots: torch.Tensor):
        super().__init__(cache)
        self.lengths_B, self.prompt_of_slot, self.slots = lengths_B, prompt_of_slot, slots
        self.max_length = int(lengths_B.max())
        starts_B = lengths_B.cumsum(0) - lengths_B
        positions_P = torch.arange(self.max_length, device=lengths_B.device)
        self.is_token_BP = positions_P < lengths_B[:, None]
        self.stream_BP = torch.where(self.is_token_BP, starts_B[:, None] + positions_P, 0)
        self.last_B = starts_B + lengths_B - 1
        """Where in the stream each prompt ends."""
        self.positions_T = positions_P.expand_as(self.stream_BP)[self.is_token_BP]

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        # Padding stands behind each prompt's tokens, where causal attention does not look.
        query, key, value = (
            part[0][:, self.stream_BP].transpose(0, 1) for part in (inputs.query_1HTD, inputs.key_1KTD, inputs.value_1KTD)
        )
        for cached, part in zip(self.cache.layer(inputs), (key, value), strict=True):
            cached[self.slots, :, : self.max_length] = part[self.prompt_of_slot]
        mask = self.mask(inputs.window)
        found_BHPD = scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=inputs.scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return found_BHPD.transpose(1, 2)[self.is_token_BP][None]

    def make_mask(self, window: int | None) -> torch.Tensor | None:
        if window is None or window >= self.max_length:
            return None
        positions_P = torch.arange(self.max_length, device=self.lengths_B.device)
        distance_PP = positions_P[:, None] - positions_P
        return (distance_PP >= 0) & (distance_PP < window)


class DecodeAttention(StepAttention):
    """One token for each of the first B slots; `lengths_B` counts the tokens that the slots hold before it."""

    def __init__(self, cache: SlotCache, lengths_B: torch.Tensor, *, max_length: int):
        super().__init__(cache)
        self.lengths_B, self.num_visible = lengths_B, max_length + 1
        self.rows_B = torch.arange(len(lengths_B), device=lengths_B.device)

    def attend(self, inputs: AttentionInputs) -> torch.Tensor:
        keys, values = self.cache.layer(inputs)
        keys[self.rows_B, :, self.lengths_B] = inputs.key_1KTD[0].transpose(0, 1)
        values[self.rows_B, :, self.lengths_B] = inputs.value_1KTD[0].transpose(0, 1)
        _, num_heads, num_rows, head_dim = inputs.query_1HTD.shape
        # The heads that share keys stand where queries of one head would: no key is repeated.
        query_BKGD = inputs.query_1HTD[0].transpose(0, 1).reshape(num_rows, inputs.key_1KTD.shape[1], -1, head_dim)
        visible = slice(0, self.num_visible)
        found_BKGD = scaled_dot_product_attention(
            query_BKGD, keys[:num_rows, :, visible], values[:num_rows, :, visible], self.mask(inputs.window), scale=inputs.scale
        )
        return found_BKGD.reshape(1, num_rows, num_heads, -1)

    def make_mask(self, window: int | None) -> torch.Tensor:
        positions_L = torch.arange(self.num_visible, device=self.lengths_B.device)
        distance_BL = self.lengths_B[:, None] - positions_L
        is_visible_BL = distance_BL >= 0
        if window is not None:
            is_visible_BL &= distance_BL < window
        return is_visible_BL[:, None, None]


def register() -> None:
    """Make the attention known to transformers under the name `ATTENTION`; harmless when done before."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _no_mask)


def _attention(
    module: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    slot_step: StepAttention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Has the signature that transformers calls; `slot_step` is the keyword argument that the engine gave the model."""
    if slot_step is None:
        raise ModelError(
            f"the torch engine cannot generate with this model: {type(module).__name__} of transformers does not pass keyword "
            "arguments on to its attention. Set rollout.engine=vllm"
        )
    if softcap is not None or s_aux is not None:
        kind = "capped attention scores" if softcap is not None else "attention sinks"
        raise ModelError(f"the torch engine cannot generate with a model that has {kind}; set rollout.engine=vllm")
    return slot_step.attend(AttentionInputs(module.layer_idx, query, key, value, scaling, sliding_window)), None


def _no_mask(*_: object, **__: object) -> None:
    """Attention makes its own masks from the step."""
