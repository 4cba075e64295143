"""Dividing rows by tokens: nothing lost, nothing twice, sums close to one another."""

import itertools
import time

import numpy as np
import pytest

from hybridflow.data.balance import balanced_parts, token_budget_parts


def wild_lengths(num_rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(5.0, 1.2, num_rows).astype(np.int64).clip(1, 4000)


def sums(lengths: np.ndarray, parts: list[np.ndarray]) -> list[int]:
    return [int(lengths[part].sum()) for part in parts]


@pytest.mark.parametrize(("num_rows", "num_parts"), [(0, 2), (1, 4), (7, 2), (64, 8), (65, 8), (3, 3)])
def test_every_row_is_in_exactly_one_part(num_rows: int, num_parts: int) -> None:
    parts = balanced_parts(wild_lengths(num_rows), num_parts)
    assert len(parts) == num_parts
    assert sorted(np.concatenate(parts).tolist()) == list(range(num_rows))
    assert all(part.dtype == np.int32 for part in parts)


def test_rows_ascend_within_a_part() -> None:
    assert all((np.diff(part) > 0).all() for part in balanced_parts(wild_lengths(100), 3))


def test_the_largest_part_is_within_four_thirds_of_the_best_division() -> None:
    for seed in range(20):
        lengths = wild_lengths(8, seed)
        # All 3^8 divisions into three parts, tried one by one.
        best = min(
            max(int(lengths[np.array(choice) == part].sum()) for part in range(3))
            for choice in itertools.product(range(3), repeat=8)
        )
        assert max(sums(lengths, balanced_parts(lengths, 3))) <= 4 / 3 * best


def test_equal_rows_are_dealt_out_evenly() -> None:
    assert sorted(len(part) for part in balanced_parts(np.full(10, 5), 4)) == [2, 2, 3, 3]


def test_rows_without_tokens_spread_too() -> None:
    assert [len(part) for part in balanced_parts(np.zeros(6, np.int64), 3)] == [2, 2, 2]


def test_a_part_is_empty_only_where_rows_are_too_few() -> None:
    assert sorted(len(part) for part in balanced_parts(np.array([1000, 1]), 3)) == [0, 1, 1]


def test_no_part_exceeds_the_budget_but_for_a_longer_row_alone() -> None:
    lengths = wild_lengths(500)
    for part, total in zip(parts := token_budget_parts(lengths, 1500), sums(lengths, parts), strict=True):
        assert total <= 1500 or len(part) == 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(500))


def test_parts_under_a_budget_are_few() -> None:
    lengths = np.random.default_rng(1).integers(50, 1024, 2000)
    # No division can have fewer than sum / budget parts; short rows fill the gaps, so one more is enough.
    assert len(token_budget_parts(lengths, 16384)) <= -(-lengths.sum() // 16384) + 1


def test_a_tight_budget_still_fits_what_fits() -> None:
    # 5 + 4 and 3 + 3 + 3 both make 9; largest first to the emptier part would end with 5 + 3 and 4 + 3 + 3 = 10.
    assert len(token_budget_parts(np.array([5, 4, 3, 3, 3]), 9)) == 2


def test_parts_under_a_budget_are_balanced() -> None:
    # Four rows of 10 under a budget of 30: three and one would fit as well, but two and two take the same time.
    assert [len(part) for part in token_budget_parts(np.full(4, 10), 30)] == [2, 2]


def test_a_minimum_of_parts_is_kept_with_empty_ones() -> None:
    parts = token_budget_parts(np.array([3, 4]), 100, min_parts=4)
    assert len(parts) == 4
    assert sorted(len(part) for part in parts) == [0, 0, 1, 1]


def test_no_rows_make_as_many_empty_parts_as_asked_for() -> None:
    assert [len(part) for part in token_budget_parts(np.empty(0, np.int64), 10, min_parts=2)] == [0, 0]


def test_the_same_rows_are_always_divided_alike() -> None:
    lengths = wild_lengths(300)
    for first, second in zip(token_budget_parts(lengths, 2000), token_budget_parts(lengths.copy(), 2000), strict=True):
        np.testing.assert_array_equal(first, second)


def test_ten_thousand_rows_take_well_under_a_second() -> None:
    lengths = wild_lengths(10_000)
    start = time.perf_counter()
    token_budget_parts(lengths, 4096)
    assert time.perf_counter() - start < 1.0
