"""Advantages against their definitions, and what must hold for any numbers."""

from __future__ import annotations

import time
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridflow import ops
from hybridflow.config.choices import Resampling
from tests.reference import advantages as reference

LENGTHS = [3, 1, 0, 7, 2, 7]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def ragged(seed: int, lengths: list[int]) -> tuple[Tensor, list[list[float]]]:
    values_T = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed))
    return values_T, [row.tolist() for row in values_T.split(lengths)]


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row])


def identity(sums: Tensor) -> Tensor:
    return sums


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (0.9, 0.0)])
def test_gae_of_ragged_rows_is_the_discounted_sum_of_temporal_differences(gamma: float, lam: float):
    rewards_T, rewards = ragged(0, LENGTHS)
    values_T, values = ragged(1, LENGTHS)
    advantages_T, returns_T = ops.gae(rewards_T, values_T, offsets(LENGTHS), gamma=gamma, lam=lam)
    expected_T = flat(reference.gae(rewards, values, gamma, lam))
    torch.testing.assert_close(advantages_T, expected_T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns_T, expected_T + values_T, atol=1e-5, rtol=1e-5)


def test_gae_by_hand():
    # delta_1 = 1 + 0.5 * 4 - 2 = 1, delta_0 = 0 + 0.5 * 2 - 3 = -2 and A_0 = -2 + 0.5 * 0.5 * A_1, where row 2 is one token:
    # row 1: values 3, 2, 4; rewards 0, 1, 6. delta_2 = 6 - 4 = 2; A_2 = 2; A_1 = 1 + 0.25 * 2 = 1.5; A_0 = -2 + 0.375.
    # row 2: value 1, reward 5: A = 4.
    advantages_T, returns_T = ops.gae(
        torch.tensor([0.0, 1.0, 6.0, 5.0]), torch.tensor([3.0, 2.0, 4.0, 1.0]), offsets([3, 1]), gamma=0.5, lam=0.5
    )
    assert advantages_T.tolist() == [-1.625, 1.5, 2.0, 4.0]
    assert returns_T.tolist() == [1.375, 3.5, 6.0, 5.0]


def test_lambda_zero_gives_one_step_errors():
    rewards_T, _ = ragged(0, [4])
    values_T, _ = ragged(1, [4])
    advantages_T, _ = ops.gae(rewards_T, values_T, offsets([4]), gamma=0.9, lam=0.0)
    following_T = torch.cat([values_T[1:], torch.zeros(1)])
    torch.testing.assert_close(advantages_T, rewards_T + 0.9 * following_T - values_T)


def test_lambda_one_gives_monte_carlo_returns_whatever_the_values():
    rewards_T, rewards = ragged(0, LENGTHS)
    values_T, _ = ragged(1, LENGTHS)
    _, returns_T = ops.gae(rewards_T, values_T, offsets(LENGTHS), gamma=0.9, lam=1.0)
    expected_T = flat([reference.discounted_returns(row, 0.9) for row in rewards])
    torch.testing.assert_close(returns_T, expected_T, atol=1e-5, rtol=1e-5)


def test_gae_of_no_rows_is_empty():
    advantages_T, returns_T = ops.gae(torch.zeros(0), torch.zeros(0), torch.tensor([0]), gamma=1.0, lam=1.0)
    assert len(advantages_T) == len(returns_T) == 0


def test_gae_of_a_large_step_takes_seconds():
    lengths = [4096] * 1024  # an eighth of the largest step that is planned for
    num_tokens = sum(lengths)
    start_s = time.perf_counter()
    ops.gae(torch.zeros(num_tokens), torch.zeros(num_tokens), offsets(lengths), gamma=1.0, lam=0.95)
    assert time.perf_counter() - start_s < 5.0


def test_the_reward_stands_at_the_last_token_and_an_empty_row_has_none():
    rewards_T = ops.token_rewards(torch.tensor([5.0, 7.0, 9.0]), offsets([2, 0, 3]))
    assert rewards_T.tolist() == [0.0, 5.0, 0.0, 0.0, 9.0]


def test_the_kl_is_taken_from_the_reward_of_each_token():
    rewards_T = ops.kl_in_reward(torch.tensor([0.0, 1.0]), torch.tensor([0.5, -1.0]), 0.1)
    torch.testing.assert_close(rewards_T, torch.tensor([-0.05, 1.1]))


def test_whitened_values_have_mean_0_and_variance_1():
    values_T = 3.0 + 5.0 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whitened_T = ops.whiten(values_T, identity)
    assert whitened_T.dtype == torch.float32
    assert abs(whitened_T.mean().item()) < 1e-6
    assert abs(whitened_T.var(correction=0).item() - 1.0) < 1e-5
    torch.testing.assert_close(whitened_T, torch.tensor(reference.whiten(values_T.tolist())), atol=1e-5, rtol=1e-5)


def test_whitening_a_large_offset_keeps_its_digits():
    values_T = torch.tensor([10000.0, 10001.0, 10002.0])
    torch.testing.assert_close(ops.whiten(values_T, identity), torch.tensor([-1.0, 0.0, 1.0]) * 1.5**0.5)


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_two_ranks_whiten_like_one(cut: int):
    values_T, _ = ragged(0, [20])
    parts = values_T[:cut], values_T[cut:]
    count = torch.tensor(20.0, dtype=torch.float64)
    mean = values_T.double().mean()
    # What an all-reduce over the two ranks returns at the first and at the second call.
    reduced = [torch.stack([values_T.double().sum(), count]), (values_T.double() - mean).square().sum()[None]]
    seen: list[list[Tensor]] = []
    whitened = []
    for part in parts:
        answers, given = iter(reduced), []
        whitened.append(ops.whiten(part, lambda sums, answers=answers, given=given: (given.append(sums), next(answers))[1]))
        seen.append(given)
    torch.testing.assert_close(torch.cat(whitened), ops.whiten(values_T, identity))
    for call, expected in enumerate(reduced):  # and what the ranks gave adds up to it
        torch.testing.assert_close(seen[0][call] + seen[1][call], expected)


def test_equal_values_whiten_to_zero():
    assert ops.whiten(torch.full((5,), 0.1), identity).abs().max() < 1e-3


REWARDS = [1.0, 0.0, 0.5, 0.25, 0.1, 0.1, 0.1, -3.0, 2.0]
GROUPS = [7, 7, -2, 7, 50, 50, 50, -2, 9]


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_group_advantages_are_those_of_each_group(scale_by_std: bool):
    advantages_B = ops.group_normalized(np.array(REWARDS, np.float32), np.array(GROUPS, np.int64), scale_by_std=scale_by_std)
    expected_B = torch.tensor(reference.group_normalized(REWARDS, GROUPS, scale_by_std))
    assert advantages_B.dtype == torch.float32
    torch.testing.assert_close(advantages_B, expected_B, atol=1e-5, rtol=1e-5)


def test_group_advantages_sum_to_zero_in_each_group():
    groups_B = torch.arange(6).repeat_interleave(8)
    rewards_B = torch.randn(48, generator=torch.Generator().manual_seed(0))
    for advantages_B in (ops.group_normalized(rewards_B, groups_B), ops.leave_one_out(rewards_B, groups_B)):
        assert advantages_B.view(6, 8).sum(dim=1).abs().max() < 1e-5


def test_a_group_of_equal_rewards_gives_exactly_zero():
    advantages_B = ops.group_normalized(np.full(7, 0.1), np.zeros(7, np.int64))
    assert advantages_B.tolist() == [0.0] * 7


def test_read_only_columns_are_read_without_a_warning(recwarn: pytest.WarningsRecorder):
    rewards_B = np.array([1.0, 0.0], np.float32)
    rewards_B.setflags(write=False)
    ops.group_normalized(rewards_B, np.zeros(2, np.int64))
    assert not recwarn.list


def test_leave_one_out_compares_with_the_others_of_the_group():
    advantages_B = ops.leave_one_out(np.array(REWARDS), np.array(GROUPS))
    expected_B = torch.tensor(reference.leave_one_out(REWARDS, GROUPS))
    torch.testing.assert_close(advantages_B, expected_B, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "weights"),
    [
        (2.0, [4.0, 0.0, 1.0, 9.0, 9.0, 2.25]),  # the square of each
        ("best_and_worst", [0.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        ("best", [0.1, 0.1, 0.1, 0.4, 0.1, 0.1]),
    ],
)
def test_rows_are_drawn_as_often_as_their_weights_say(method: float | Resampling, weights: list[float]):
    rewards_B = np.array([2.0, 0.0, 1.0, 3.0, -3.0, 1.5])
    drawn = [ops.drawn_by_reward(rewards_B, method, seeds=(0, step)) for step in range(4000)]
    shares = np.bincount(np.concatenate(drawn), minlength=6) / 24000
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=0.012)  # four deviations of a share of 0.4
    assert (ops.drawn_by_reward(rewards_B, method, seeds=(0, 1)) == drawn[1]).all()


@pytest.mark.parametrize("rewards", [[1e-4, 5e-5, 0.0], [0.1, 2e-3, 0.0], [7.0, -3.0, 0.0]])
def test_a_power_of_rewards_has_its_floor_whatever_their_scale(rewards: list[float]):
    weights = np.abs(rewards) ** 3 + 1e-8
    drawn = [ops.drawn_by_reward(np.array(rewards), 3.0, seeds=(step,)) for step in range(4000)]
    shares = np.bincount(np.concatenate(drawn), minlength=3) / 12000
    assert shares == pytest.approx(weights / weights.sum(), abs=0.02)  # over four deviations


@pytest.mark.parametrize("reward", [0.0, 1.0, -1e38, 1e-38])
@pytest.mark.parametrize("method", [0.5, 8.0, *get_args(Resampling)])
def test_rows_of_equal_rewards_are_drawn_alike(method: float | Resampling, reward: float):
    drawn = [ops.drawn_by_reward(np.full(4, reward), method, seeds=(step,)) for step in range(1000)]
    assert np.bincount(np.concatenate(drawn)) / 4000 == pytest.approx(np.full(4, 0.25), abs=0.035)  # five deviations
