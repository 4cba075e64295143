"""Causal attention within the rows of a packed sequence, registered with transformers under the name `NAME`.

The spans of the rows reach it through the keyword `row_spans` of the model's forward. B rows, T tokens, Hq query and
Hk key-value heads, D channels of a head, P tokens with padding. Values may have other channels than queries and keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Literal, cast

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from hybridflow.errors import ModelError
from hybridflow.models.packing import RowSpans
from hybridflow.parallel.sequence import SequenceGroup

NAME = "hybridflow_packed"
FLASH_NAME = "hybridflow_packed_fa"
"""Without the word flash: transformers looks for such names in a hub of kernels, and refuses what it does not find there."""
FLASH_MODULES = ("flash_attn_interface", "flash_attn", "flash_attn.cute")
"""Where releases 3, 2 and 4 of flash-attn keep `flash_attn_varlen_func`; they take the same keywords."""
HALF_DTYPES = (torch.bfloat16, torch.float16)
"""What the kernels for packed rows compute in."""
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, RowSpans, float], torch.Tensor]
"""(query [T, Hq, D], key [T, Hk, D], value [T, Hk, D], spans, scale) -> [T, Hq, D]."""


def implementation(choice: Literal["auto", "flash_attn", "torch"], device: torch.device, dtype: torch.dtype) -> str:
    """The name under which transformers finds the attention for models that compute on `device` in `dtype`.

    Raises:
        ModelError: flash-attn was asked for, and is not installed, or does not do this device or dtype.
    """
    is_possible = device.type == "cuda" and dtype in HALF_DTYPES
    if choice == "torch" or (choice == "auto" and not (is_possible and flash_attention())):
        return NAME
    if not is_possible:
        raise ModelError(
            f"model.attention=flash_attn needs CUDA and bfloat16; this rank computes on {device} in {dtype}. Use torch or auto"
        )
    if flash_attention() is None:
        raise ModelError("model.attention=flash_attn, but flash-attn is not installed. Install it, or use torch")
    return FLASH_NAME


@cache
def flash_attention() -> Callable[..., torch.Tensor | tuple[torch.Tensor, ...]] | None:
    """`flash_attn_varlen_func` of the first release in `FLASH_MODULES` that is installed."""
    for name in FLASH_MODULES:
        with suppress(ImportError, AttributeError):  # release 4 alone leaves `flash_attn` an empty namespace
            return cast(Callable[..., torch.Tensor], importlib.import_module(name).flash_attn_varlen_func)
    return None


def _attention_of(kernel_for: Callable[[torch.Tensor], Kernel]) -> Callable[..., tuple[torch.Tensor, None]]:
    """transformers' calling convention around a kernel: takes [1, heads, T, D], gives [1, T, heads, D]."""

    def attend(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        row_spans: RowSpans | None = None,
        sequence_group: SequenceGroup | None = None,
        **others: object,
    ) -> tuple[torch.Tensor, None]:
        if row_spans is None:
            raise ModelError(
                f"{type(module).__name__} of transformers does not pass keyword arguments on to its attention, which would not "
                "know where rows end. Use another model"
            )
        _refuse_what_would_be_ignored(row_spans, sliding_window, others)
        assert query.shape[0] == 1, "packed attention takes one sequence that holds all rows"
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        query_THD, key_THD, value_THD = (states[0].transpose(0, 1) for states in (query, key, value))
        if sequence_group is not None:
            key_THD, value_THD = (sequence_group.repeat_heads(s, query_THD.shape[1]) for s in (key_THD, value_THD))
            query_THD, key_THD, value_THD = (sequence_group.to_heads(s) for s in (query_THD, key_THD, value_THD))
        output_THD = kernel_for(query)(query_THD, key_THD, value_THD, row_spans, scale)
        if sequence_group is not None:
            output_THD = sequence_group.to_tokens(output_THD)
        return output_THD[None], None

    return attend


def _refuse_what_would_be_ignored(spans: RowSpans, sliding_window: int | None, others: dict[str, object]) -> None:
    assert sliding_window is None or spans.max_seqlen <= sliding_window, (
        f"a row has {spans.max_seqlen} tokens and a layer attends to the last {sliding_window} only, which packed attention "
        "does not do; load_causal_lm refuses such models"
    )
    for name in ("softcap", "s_aux"):
        if others.get(name) is not None:
            raise ModelError(f"the model's attention uses {name}, which packed attention does not do. Use another model")


def _padded_buckets(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, spans: RowSpans, scale: float
) -> torch.Tensor:
    """Any device: rows of similar length padded on the right, where the causal mask hides the padding: its gradient is 0."""
    padding = spans.padding
    sizes = [bucket.num_rows * bucket.longest for bucket in padding.buckets]
    padded = [states.index_select(0, padding.source_P) for states in (query_THD, key_THD, value_THD)]
    parts = [torch.split(states, sizes) for states in padded]
    outputs = []
    for bucket, *states in zip(padding.buckets, *parts, strict=True):
        shape = (bucket.num_rows, bucket.longest, -1)
        query, key, value = (s.view(*shape, s.shape[-1]).transpose(1, 2) for s in states)
        is_grouped = query.shape[1] != key.shape[1]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, padding.place_T)


def _equal_channels(kernel: Kernel) -> Kernel:
    """A kernel that takes values with other channels than queries and keys: zeros make up for what is missing."""

    def attend(
        query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, spans: RowSpans, scale: float
    ) -> torch.Tensor:
        channels = value_THD.shape[-1]
        missing = query_THD.shape[-1] - channels
        if missing > 0:
            value_THD = F.pad(value_THD, (0, missing))
        elif missing < 0:
            query_THD, key_THD = F.pad(query_THD, (0, -missing)), F.pad(key_THD, (0, -missing))
        return kernel(query_THD, key_THD, value_THD, spans, scale)[..., :channels]

    return attend


def _torch_varlen(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, spans: RowSpans, scale: float
) -> torch.Tensor:
    """CUDA with torch's own kernel. Heads are repeated since `enable_gqa` came after torch 2.11."""
    from torch.nn.attention.varlen import varlen_attn

    repeats = query_THD.shape[1] // key_THD.shape[1]
    if repeats > 1:
        key_THD, value_THD = key_THD.repeat_interleave(repeats, dim=1), value_THD.repeat_interleave(repeats, dim=1)
    starts, longest = spans.cu_seqlens_B1, spans.max_seqlen
    attended = varlen_attn(query_THD, key_THD, value_THD, starts, starts, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(attended, torch.Tensor), "varlen_attn gives more than the output only where asked to"
    return attended


def _flash_varlen(
    query_THD: torch.Tensor, key_THD: torch.Tensor, value_THD: torch.Tensor, spans: RowSpans, scale: float
) -> torch.Tensor:
    function = flash_attention()
    assert function is not None, "`implementation` has looked for it"
    starts, longest = spans.cu_seqlens_B1, spans.max_seqlen
    lengths = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": longest, "max_seqlen_k": longest}
    attended = function(query_THD, key_THD, value_THD, **lengths, softmax_scale=scale, causal=True)
    return attended[0] if isinstance(attended, tuple) else attended


def _torch_kernel(query: torch.Tensor) -> Kernel:
    return _equal_channels(_torch_varlen) if query.is_cuda and query.dtype in HALF_DTYPES else _padded_buckets


# No mask function is registered beside them: transformers then builds no mask and asks the device nothing.
AttentionInterface.register(NAME, _attention_of(_torch_kernel))
AttentionInterface.register(FLASH_NAME, _attention_of(lambda query: _equal_channels(_flash_varlen)))
