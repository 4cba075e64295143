"""Checksums: what they notice, and that parts add up to the whole."""

from __future__ import annotations

import pytest
import torch

from hybridflow.resharding.checksum import Checksums, odd_numbers

CPU = torch.device("cpu")


def checksum(tensor: torch.Tensor) -> int:
    checksums = Checksums([("t", tuple(tensor.shape))], dtype=tensor.dtype, device=CPU)
    checksums.add("t", tensor)
    return int(checksums.finish())


def slow_checksum(tensor: torch.Tensor) -> int:
    """Python integers and no wrap-around until the end; bfloat16 with rows of a multiple of 8 bytes only."""
    bits = tensor.view(torch.int16).tolist()
    total = 0
    row_weights = odd_numbers(len(bits), stream=1).tolist()
    column_weights = odd_numbers(len(bits[0]) // 4, stream=2).tolist()
    for row, row_weight in zip(bits, row_weights, strict=True):
        for column, column_weight in enumerate(column_weights):
            word = sum((row[4 * column + i] & 0xFFFF) << (16 * i) for i in range(4))
            total += row_weight * column_weight * word
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def test_it_is_the_sum_that_the_module_describes():
    tensor = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert checksum(tensor) == slow_checksum(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 8), (6, 5), (7, 3), (9,), (4, 3, 2), (2, 1)])
def test_every_single_bit_counts(shape: tuple[int, ...], dtype: torch.dtype):
    tensor = torch.randn(shape).to(dtype)
    before = checksum(tensor)
    bits = tensor.view(torch.int16).view(-1)
    for element in range(len(bits)):
        for bit in (0, 7, 15):
            bits[element] ^= torch.tensor(1 << bit, dtype=torch.int32).to(torch.int16)
            assert checksum(tensor) != before
            bits[element] ^= torch.tensor(1 << bit, dtype=torch.int32).to(torch.int16)
    assert checksum(tensor) == before


def test_a_transposed_square_is_noticed():
    tensor = torch.randn(16, 16).bfloat16()
    assert checksum(tensor) != checksum(tensor.T.contiguous())


def test_exchanged_rows_and_exchanged_columns_are_noticed():
    tensor = torch.randn(16, 16).bfloat16()
    assert checksum(tensor) != checksum(tensor.flip(0))
    assert checksum(tensor) != checksum(tensor.roll(4, dims=1))  # whole words move: four bfloat16 are one


def test_shards_add_up_to_the_whole_for_any_cut():
    for num_shards in (1, 2, 3, 7):
        tensor = torch.randn(17, 5).bfloat16()
        total = torch.zeros(1, dtype=torch.int64)
        first_row = 0
        for part in tensor.chunk(num_shards):
            checksums = Checksums([("t", (17, 5))], dtype=torch.bfloat16, device=CPU)
            checksums.add("t", part, first_row=first_row)
            total += checksums.finish()
            first_row += len(part)
        assert int(total) == checksum(tensor)


def test_the_memory_layout_does_not_matter():
    tensor = torch.randn(8, 6).bfloat16()
    strided = torch.empty(6, 8, dtype=torch.bfloat16).T.copy_(tensor)
    odd_start = torch.empty(49, dtype=torch.bfloat16)[1:].view(8, 6).copy_(tensor)
    assert checksum(strided) == checksum(odd_start) == checksum(tensor)


def test_large_tensors_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch):
    tensor = torch.randn(100, 8).bfloat16()
    whole = checksum(tensor)
    monkeypatch.setattr("hybridflow.resharding.checksum.WORDS_AT_ONCE", 7)
    assert checksum(tensor) == whole


def test_many_tensors_keep_their_own_numbers():
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in [("a", (3, 4)), ("b", (7,)), ("c", (5, 2)), ("d", ())]}
    together = Checksums([(n, tuple(t.shape)) for n, t in tensors.items()], dtype=torch.bfloat16, device=CPU)
    for name in ("c", "a", "d", "b"):
        together.add(name, tensors[name])
    assert together.finish().tolist() == [checksum(tensor) for tensor in tensors.values()]
    assert together.unseen == ()


def test_a_part_without_rows_has_the_checksum_zero():
    checksums = Checksums([("empty", (0, 4)), ("t", (2, 4))], dtype=torch.bfloat16, device=CPU)
    checksums.add("empty", torch.empty(0, 4, dtype=torch.bfloat16))
    tensor = torch.randn(2, 4).bfloat16()
    checksums.add("t", tensor)
    assert checksums.finish().tolist() == [0, checksum(tensor)]
