"""Packed attention against attention row by row with an explicit mask."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from hybridflow.errors import ModelError
from hybridflow.models.attention import FLASH_NAME, NAME, flash_attention, implementation
from hybridflow.models.packing import RowSpans

CPU = torch.device("cpu")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: RowSpans, **others: object) -> torch.Tensor:
    function = AttentionInterface()[NAME]
    output, _ = function(torch.nn.Module(), query, key, value, None, scaling=0.3, row_spans=spans, **others)
    return output


def attend_row_by_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Slow reference: softmax over the earlier tokens of the same row, key-value heads repeated by hand."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    outputs, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        scores = 0.3 * query[0, :, rows] @ key[0, :, rows].transpose(1, 2)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs.append(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ value[0, :, rows])
        start += length
    return torch.cat(outputs, dim=1).transpose(0, 1)[None]


@pytest.mark.parametrize("lengths", [[1], [5, 5], [1, 90, 2, 40, 3, 17]])
def test_outputs_and_gradients_are_those_of_attention_row_by_row(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    states = [torch.randn(1, heads, tokens, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)]
    weights = torch.randn(1, tokens, 4, 8, generator=generator)

    packed = attend(*states, RowSpans.of_lengths(np.array(lengths), CPU))
    expected = attend_row_by_row(*states, lengths)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-5)

    gradients = torch.autograd.grad((packed * weights).sum(), states)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), states)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_a_row_longer_than_a_sliding_window_never_comes_through() -> None:
    state = torch.zeros(1, 2, 6, 4)
    spans = RowSpans.of_lengths(np.array([6]), CPU)
    attend(state, state, state, spans, sliding_window=6)
    with pytest.raises(AssertionError, match="attends to the last 5 only"):
        attend(state, state, state, spans, sliding_window=5)


def test_a_soft_cap_is_refused() -> None:
    state = torch.zeros(1, 2, 6, 4)
    with pytest.raises(ModelError, match="softcap"):
        attend(state, state, state, RowSpans.of_lengths(np.array([6]), CPU), softcap=30.0)


def test_the_cpu_takes_torch_and_refuses_flash_attn() -> None:
    assert implementation("auto", CPU, torch.bfloat16) == NAME != FLASH_NAME
    with pytest.raises(ModelError, match=r"needs CUDA and bfloat16.*on cpu"):
        implementation("flash_attn", CPU, torch.bfloat16)


def flash_attn_varlen_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **others: object) -> tuple[torch.Tensor, None]:
    """What the releases of flash-attn agree on; release 4 gives a pair."""
    names = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal"}
    assert set(others) == names and others["causal"] is True and others["softmax_scale"] == 0.3
    assert others["cu_seqlens_q"] is others["cu_seqlens_k"] and others["max_seqlen_q"] == others["max_seqlen_k"] == 40
    starts = others["cu_seqlens_q"]
    assert isinstance(starts, torch.Tensor)
    lengths = starts.diff().tolist()
    return attend_row_by_row(*(states.transpose(0, 1)[None] for states in (q, k, v)), lengths)[0], None


@pytest.fixture(params=["flash_attn_interface", "flash_attn", "flash_attn.cute"])
def release(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """One release of flash-attn alone: an empty `flash_attn` is what release 4 leaves beside `flash_attn.cute`."""
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name) if name == "flash_attn" else None)
    module = ModuleType(request.param)
    module.__dict__["flash_attn_varlen_func"] = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, request.param, module)
    flash_attention.cache_clear()
    yield request.param
    flash_attention.cache_clear()


def test_each_release_of_flash_attn_is_found_and_called_with_the_keywords_that_it_takes(release: str) -> None:
    assert implementation("flash_attn", torch.device("cuda"), torch.bfloat16) == FLASH_NAME
    assert implementation("auto", torch.device("cuda"), torch.float32) == NAME, release
    lengths = [1, 40, 7]
    states = [torch.randn(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
    spans = RowSpans.of_lengths(np.array(lengths), CPU)
    output, _ = AttentionInterface()[FLASH_NAME](torch.nn.Module(), *states, None, scaling=0.3, row_spans=spans)
    torch.testing.assert_close(output, attend_row_by_row(*states, lengths), rtol=1e-5, atol=1e-5)


def test_without_flash_attn_torch_is_taken_and_asking_for_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    flash_attention.cache_clear()
    assert implementation("auto", torch.device("cuda"), torch.bfloat16) == NAME
    with pytest.raises(ModelError, match="flash-attn is not installed"):
        implementation("flash_attn", torch.device("cuda"), torch.bfloat16)
    flash_attention.cache_clear()


@pytest.mark.parametrize("name", [NAME, FLASH_NAME])
def test_transformers_takes_the_names_for_what_is_registered_here(name: str) -> None:
    """Names with `flash` in them it would look for in a hub of kernels."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 8}
    config = Qwen2Config(**sizes, num_key_value_heads=1)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=name)
    assert model.config._attn_implementation == name
