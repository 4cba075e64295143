"""What an engine reads of each tensor is found out by a rehearsal, and only that is given to it later."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from hybridflow.errors import EngineError
from hybridflow.resharding.layout import Box
from hybridflow.resharding.window import Window, rehearse

CPU = torch.device("cpu")
SHAPE = (6, 4)
SECOND_HALF = Box((3, 0), (6, 4))

READS = {
    "narrowed rows": (lambda weight: torch.empty(3, 4).copy_(weight.narrow(0, 3, 3)), SECOND_HALF),
    "sliced columns": (lambda weight: torch.empty(6, 2).copy_(weight[:, 2:]), Box((0, 2), (6, 4))),
    "a slice of a copy": (lambda weight: torch.empty(3, 4).copy_(weight.clone().detach()[3:]), SECOND_HALF),
    "the same slice twice": (lambda weight: weight[3:] + weight[3:6], SECOND_HALF),
    "a slice of a slice": (lambda weight: weight[3:][:, 1:2], SECOND_HALF),
    "columns counted from the end": (lambda weight: weight.narrow(-1, 2, 2).clone(), Box((0, 2), (6, 4))),
    "rows beyond the end, and some": (lambda weight: (weight[9:], weight[3:]), SECOND_HALF),
    "rows beyond the end alone": (lambda weight: weight.narrow(0, 6, 0), None),
    "everything": (lambda weight: torch.empty(6, 4).copy_(weight), None),
    "a full slice": (lambda weight: torch.empty(6, 4).copy_(weight[:]), None),
    "two slices": (lambda weight: weight[:2] + weight[2:4], None),
    "chunks": (lambda weight: weight.chunk(2)[1].clone(), None),
    "a product": (lambda weight: weight.T @ weight, None),
    "nothing": (lambda weight: None, None),
}


@pytest.mark.parametrize("way", READS)
def test_the_rehearsal_finds_what_is_read(way: str):
    read, expected = READS[way]

    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            assert (tuple(tensor.shape), tensor.dtype, tensor.device) == (SHAPE, torch.float32, CPU)
            read(tensor)

    part = rehearse(load, [("weight", SHAPE)], dtype=torch.float32, device=CPU)
    assert part == ({} if expected is None else {"weight": expected})


@pytest.mark.parametrize("way", ["narrowed rows", "a slice of a copy", "the same slice twice", "a slice of a slice"])
def test_a_window_gives_what_the_whole_tensor_would(way: str):
    whole = torch.randn(SHAPE)
    read, _ = READS[way]
    window = Window(whole[3:].clone(), SHAPE, SECOND_HALF, weight="q", reads=[])
    assert torch.equal(read(window), read(whole))


@pytest.mark.parametrize("way", ["sliced columns", "everything", "two slices", "chunks", "a product"])
def test_reading_outside_the_window_is_an_error_that_names_the_tensor(way: str):
    window = Window(torch.randn(3, 4), SHAPE, SECOND_HALF, weight="layers.0.q", reads=[])
    with pytest.raises(EngineError, match=r"read .* of layers.0.q \(6, 4\)"):
        READS[way][0](window)


def test_a_rehearsal_takes_no_memory_for_the_tensors():
    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            assert isinstance(tensor, Window)
            assert tensor.held.untyped_storage().nbytes() == 2

    rehearse(load, [("weight", (2**20, 2**20))], dtype=torch.bfloat16, device=CPU)
