"""Rows packed into one sequence, and cut over sequence ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hybridflow.batch import Ragged
from hybridflow.errors import BatchError
from hybridflow.models.packing import RowSpans, pack

CPU = torch.device("cpu")


def ragged(*rows: list[int]) -> Ragged:
    return Ragged.from_rows(rows, np.int32)


def test_each_row_is_its_prompt_followed_by_its_response() -> None:
    packed = pack(ragged([1, 2], [3]), ragged([4], [5, 6]), CPU)
    assert packed.input_ids_1T.tolist() == [[1, 2, 4, 3, 5, 6]]
    assert packed.position_ids_1T.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.spans.cu_seqlens_B1.tolist() == [0, 3, 6]
    assert packed.spans.max_seqlen == 3


def test_a_response_token_is_predicted_one_position_before_it() -> None:
    packed = pack(ragged([1, 2], [3]), ragged([4], [5, 6]), CPU)
    assert packed.predicting_R.tolist() == [1, 3, 4]
    assert packed.targets_R.tolist() == [4, 5, 6]


def test_a_row_without_a_response_predicts_nothing() -> None:
    packed = pack(ragged([1, 2], [3]), ragged([], [5]), CPU)
    assert packed.input_ids_1T.tolist() == [[1, 2, 3, 5]]
    assert packed.predicting_R.tolist() == [2]


def test_a_row_without_a_prompt_is_refused_by_number() -> None:
    with pytest.raises(BatchError, match="row 1 of 2 has a prompt without tokens"):
        pack(ragged([1], []), ragged([2], [3]), CPU)


@pytest.mark.parametrize("sequence_size", [2, 3, 4])
def test_ranks_laid_end_to_end_are_the_whole_with_padding_in_a_row_of_its_own(sequence_size: int) -> None:
    prompt, response = ragged([1, 2], [3], [4, 5, 6]), ragged([7, 8, 9], [], [10, 11])
    whole = pack(prompt, response, CPU)
    ranks = [pack(prompt, response, CPU, sequence_rank=rank, sequence_size=sequence_size) for rank in range(sequence_size)]

    tokens = torch.cat([rank.input_ids_1T[0] for rank in ranks])
    assert tokens[:11].tolist() == whole.input_ids_1T[0].tolist()
    assert len(tokens) % sequence_size == 0
    assert torch.cat([rank.targets_R for rank in ranks]).tolist() == whole.targets_R.tolist()
    assert ranks[0].rank_sizes == tuple(len(rank.targets_R) for rank in ranks)
    offset = len(tokens) // sequence_size
    predicting = [rank.predicting_R + number * offset for number, rank in enumerate(ranks)]
    assert torch.cat(predicting).tolist() == whole.predicting_R.tolist()
    assert ranks[0].spans.lengths_B.tolist()[:3] == [5, 1, 5]


@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [1, 200, 7, 0, 9, 1000, 8], list(range(1, 60))])
def test_padding_there_and_back_is_the_identity(lengths: list[int]) -> None:
    spans = RowSpans.of_lengths(np.array(lengths), CPU)
    tokens = torch.arange(sum(lengths))
    padding = spans.padding
    assert torch.equal(tokens[padding.source_P][padding.place_T], tokens)
    assert len(padding.source_P) == sum(bucket.num_rows * bucket.longest for bucket in padding.buckets)


def test_wildly_different_lengths_need_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 500)
    padding = RowSpans.of_lengths(lengths, CPU).padding
    assert len(padding.source_P) < 1.2 * lengths.sum()
    assert len(padding.buckets) < 30
