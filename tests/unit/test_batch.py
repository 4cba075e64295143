"""The batch: rows move by rewriting positions, data stays."""

import numpy as np
import pytest

from hybridflow.batch import Batch, LocalShard, Ragged, Source
from hybridflow.errors import BatchError


def three_rows() -> Batch:
    return Batch.from_columns(
        {
            "reward": np.array([1.0, 2.0, 3.0], np.float32),
            "response": Ragged.from_rows([[1], [2, 2], [3, 3, 3]], np.int32),
            "response_text": ["a", "b", "c"],
        }
    )


def rows_of(batch: Batch, name: str) -> list[list[int]]:
    return [row.tolist() for row in batch.tokens(name)]


def test_select_reorders_per_row_and_per_token_columns_alike() -> None:
    batch = three_rows().select([2, 0, 2])
    assert batch["reward"].tolist() == [3.0, 1.0, 3.0]
    assert rows_of(batch, "response") == [[3, 3, 3], [1], [3, 3, 3]]
    assert batch.objects("response_text") == ["c", "a", "c"]


def test_whole_shards_are_read_without_a_copy() -> None:
    batch = three_rows()
    stored = batch.sources[0].shards[0].fetch()["response"]
    assert isinstance(stored, Ragged)
    assert batch.tokens("response").values is stored.values
    assert np.shares_memory(batch.select([1, 2]).tokens("response").values, stored.values)


def test_repeat_counts_samples_within_each_row() -> None:
    batch = three_rows().repeat(2)
    assert batch["reward"].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert batch["sample"].tolist() == [0, 1, 0, 1, 0, 1]


def test_split_and_concatenate_give_back_the_batch() -> None:
    parts = three_rows().split(2)
    assert [len(part) for part in parts] == [2, 1]
    whole = Batch.concatenate(parts)
    assert rows_of(whole, "response") == [[1], [2, 2], [3, 3, 3]]
    assert whole.objects("response_text") == ["a", "b", "c"]


def test_concatenated_batches_can_be_reordered_over_their_border() -> None:
    whole = Batch.concatenate([three_rows(), three_rows().select([2, 1])]).select([4, 0, 3])
    assert rows_of(whole, "response") == [[2, 2], [1], [3, 3, 3]]


def test_select_leaves_out_shards_that_no_row_stands_in() -> None:
    whole = Batch.concatenate([three_rows(), three_rows(), three_rows()])
    chosen = whole.select([8, 1])
    assert len(chosen.sources[0].shards) == 2
    assert rows_of(chosen, "response") == [[3, 3, 3], [2, 2]]


def test_join_adds_columns_and_the_later_batch_wins() -> None:
    values = Ragged.from_rows([[9], [9, 9], [9, 9, 9]], np.float32)
    joined = three_rows().join(Batch.from_columns({"response": values, "reward": np.zeros(3, np.float32)}))
    assert rows_of(joined, "response") == [[9], [9, 9], [9, 9, 9]]
    assert joined["reward"].tolist() == [0.0, 0.0, 0.0]
    assert joined.objects("response_text") == ["a", "b", "c"]


def test_join_refuses_other_rows() -> None:
    with pytest.raises(BatchError, match="this batch has 3, the other 2"):
        three_rows().join(three_rows().select([0, 1]))


def test_a_missing_column_says_who_writes_it() -> None:
    with pytest.raises(BatchError, match=r"'values' is missing: it is written by critic\.values"):
        three_rows().tokens("values")


def test_a_per_token_column_is_not_read_like_a_per_row_one() -> None:
    with pytest.raises(BatchError, match="token-level data"):
        three_rows()["response"]


def test_columns_must_have_the_same_rows() -> None:
    with pytest.raises(BatchError, match="same number of rows"):
        Batch.from_columns({"reward": np.zeros(2), "response": Ragged.from_rows([[1]], np.int32)})


def test_handles_stay_small_whatever_the_tokens() -> None:
    # Each row is one int32 position at most, and none where rows stand in order.
    shard = LocalShard({"response": Ragged.from_rows([[1]] * 1000, np.int32)}, 1000)
    source = Source(("response",), (shard,), range(1000))
    assert isinstance(source.take(np.arange(100, 200, dtype=np.int32)).positions, range)
    assert source.take(np.arange(200, 100, -1, dtype=np.int32)).positions.nbytes == 400  # type: ignore[union-attr]


def test_empty_selection_keeps_the_columns() -> None:
    empty = three_rows().select([])
    assert len(empty) == 0 and "reward" in empty
    assert rows_of(empty, "response") == [] and empty.objects("response_text") == []
