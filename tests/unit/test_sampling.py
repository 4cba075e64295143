"""Drawing tokens: the cuts, the random numbers, stop strings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hybridflow.rollout.sampling import SamplingColumns, choose, filter_probs, sample
from hybridflow.rollout.seeds import mixed_seed, uniform
from hybridflow.rollout.stopping import StopStrings, detokenizer, end_of_sequence_ids


def columns(count: int, **values: float | list[float]) -> SamplingColumns:
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "uniform": 0.5}
    types = {"top_k": torch.int64, "uniform": torch.float64}

    def column(name: str) -> torch.Tensor:
        value = values.get(name, defaults[name])
        return torch.tensor(value if isinstance(value, list) else [value] * count, dtype=types.get(name, torch.float32))

    return SamplingColumns(*(column(name) for name in defaults))


def kept(probs: list[float], **values: float) -> list[int]:
    (row,) = filter_probs(torch.tensor([probs]), columns(1, **values))
    return row.nonzero()[:, 0].tolist()


def test_top_k_keeps_the_most_probable() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2) == [1, 3]


def test_top_k_above_the_vocabulary_keeps_all() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=9) == [0, 1, 2, 3]


def test_top_p_keeps_the_smallest_set_that_reaches_the_sum() -> None:
    # In order: 0.4, 0.3, 0.2, 0.1. Sums before each: 0, 0.4, 0.7, 0.9. Kept while that is below 0.5.
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.5) == [1, 3]


def test_top_p_keeps_at_least_the_most_probable() -> None:
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=1e-6) == [1]


def test_min_p_is_relative_to_the_most_probable() -> None:
    # 0.6 * 0.4 = 0.24
    assert kept([0.1, 0.4, 0.2, 0.3], min_p=0.6) == [1, 3]


def test_top_p_counts_what_top_k_left() -> None:
    # Top 2 leaves 0.4 and 0.3, normalised 0.571 and 0.429. Of all four, 0.4 alone would not reach 0.5; here it does.
    assert kept([0.1, 0.4, 0.2, 0.3], top_k=2, top_p=0.57) == [1]
    assert kept([0.1, 0.4, 0.2, 0.3], top_p=0.57) == [1, 3]


def test_cuts_do_not_change_what_is_kept() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert torch.equal(filter_probs(probs, columns(1, top_k=2)), torch.tensor([[0.0, 0.4, 0.0, 0.3]]))


def test_each_row_has_its_own_cut() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).repeat(3, 1)
    found = filter_probs(probs, columns(3, top_k=[0, 1, 0], top_p=[1.0, 1.0, 0.5]))
    assert (found > 0).sum(1).tolist() == [4, 1, 2]


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.4999, 1), (0.5001, 2), (0.6999, 2), (0.9999, 3)]
)
def test_a_token_is_where_the_number_falls_in_the_cumulative_distribution(number: float, token: int) -> None:
    # Cumulative: 0.1, 0.5, 0.7, 1.0
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    tokens, _ = choose(logits, columns(1, uniform=number))
    assert tokens.tolist() == [token]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    for number in (0.0, 0.5, 1 - 2.0**-52):
        tokens, _ = choose(logits, columns(1, uniform=number))
        assert tokens.item() in (1, 3)


def test_log_probs_are_after_temperature_and_before_the_cuts() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    tokens, log_probs = choose(logits, columns(2, temperature=[0.5, 0.0], top_k=1))
    assert tokens.tolist() == [2, 2]
    # At temperature 0.5 the logits are 2, 4, 6; greedy takes them as they are.
    expected = [6 - np.log(np.exp([2, 4, 6]).sum()), 3 - np.log(np.exp([1, 2, 3]).sum())]
    assert log_probs.tolist() == pytest.approx(expected, abs=1e-6)


def test_rows_in_several_parts_are_drawn_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    numbers = columns(7, uniform=np.linspace(0, 0.99, 7).tolist(), top_p=0.9)
    whole = choose(logits, numbers)
    monkeypatch.setattr("hybridflow.rollout.sampling.ELEMENTS_AT_ONCE", 33)
    parts = choose(logits, numbers)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_random_numbers_are_uniform_and_not_correlated() -> None:
    seeds = np.arange(200, dtype=np.uint64)
    numbers = np.stack([uniform(seeds, np.full(200, position)) for position in range(200)])
    assert numbers.min() >= 0 and numbers.max() < 1
    # Of 40,000 numbers in 20 bins of 2,000 +- 44: six standard deviations.
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert np.abs(counts - 2000).max() < 6 * 44
    # Correlations of 39,800 pairs have standard deviation 0.005.
    assert abs(np.corrcoef(numbers[1:].ravel(), numbers[:-1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[:, 1:].ravel(), numbers[:, :-1].ravel())[0, 1]) < 0.03


def test_random_numbers_are_a_function_of_seed_and_position() -> None:
    together = uniform(np.array([3, 4, 5], np.uint64), np.array([7, 7, 7]))
    assert uniform(np.array([4], np.uint64), np.array([7]))[0] == together[1]
    assert len({*together, uniform(np.array([4], np.uint64), np.array([8]))[0]}) == 4


def test_mixed_seeds_differ_and_fit_63_bits() -> None:
    prompts, samples = np.divmod(np.arange(10_000), 100)
    seeds = mixed_seed(prompts, samples)
    assert len(set(seeds.tolist())) == 10_000
    assert seeds.dtype == np.int64 and seeds.min() >= 0
    assert mixed_seed(np.array([1]), np.array([2])) != mixed_seed(np.array([2]), np.array([1]))


def completed_at(text: str, stop: list[str], folder: str) -> int | None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    watch = StopStrings(stop, detokenizer(tokenizer))
    for number, token in enumerate(tokenizer(text).input_ids):
        if watch.ends_with(token):
            return number
    return None


def test_a_stop_string_is_seen_with_its_last_character(tiny_model: str) -> None:
    assert completed_at("ab#### 12", ["### "], tiny_model) == 6


def test_a_stop_string_of_one_character_is_seen(tiny_model: str) -> None:
    assert completed_at("12\n3", ["\n"], tiny_model) == 2


def test_the_first_of_several_stop_strings_counts(tiny_model: str) -> None:
    assert completed_at("abcdef", ["ef", "cd"], tiny_model) == 3


def test_half_a_stop_string_does_not_stop(tiny_model: str) -> None:
    assert completed_at("ab#ab#ab", ["##"], tiny_model) is None


def test_special_tokens_are_no_part_of_the_text(tiny_model: str) -> None:
    assert completed_at("a<eos>b", ["ab"], tiny_model) == 2
    assert completed_at("a<eos>b", ["<eos>"], tiny_model) is None


def test_characters_of_several_bytes_are_read_when_complete() -> None:
    text = "für".encode()
    watch = StopStrings(["ü"], lambda ids: bytes(ids).decode(errors="replace"))
    assert [watch.ends_with(byte) for byte in text] == [False, False, True, False]


def test_ends_of_sequence_come_from_all_three_places(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = tmp_path_factory.mktemp("ends")
    config = AutoConfig.from_pretrained(tiny_model)
    config.eos_token_id = 7
    config.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 9]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)  # <eos> is 2
    assert end_of_sequence_ids(str(folder), tokenizer) == (2, 7, 9)
    (folder / "generation_config.json").unlink()
    assert end_of_sequence_ids(str(folder), tokenizer) == (2, 7)


@pytest.mark.parametrize("num_tokens", [1, 5, 7 * 13, 256, 1009, 6000])
def test_a_draw_in_blocks_is_the_inverse_of_the_whole_distribution(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    probs_BV = torch.randn(50, num_tokens, generator=generator).mul_(4).softmax(-1)
    probs_BV[:, 1::3] = 0.0  # as after a cut
    uniform_B = torch.from_numpy(uniform(np.arange(50, dtype=np.uint64), np.arange(50)))
    cumulative_BV = probs_BV.cumsum(-1, dtype=torch.float64)
    expected_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True)
    assert sample(probs_BV, uniform_B).tolist() == expected_B1[:, 0].tolist()


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-52])
def test_the_ends_of_the_interval_draw_no_token_that_was_cut(number: float) -> None:
    probs_BV = torch.rand(20, 2400, generator=torch.Generator().manual_seed(1)).pow(30)
    probs_BV[:, :700] = 0.0
    probs_BV[:, -700:] = 0.0
    tokens_B = sample(probs_BV, torch.full((20,), number, dtype=torch.float64))
    assert (probs_BV.gather(1, tokens_B[:, None]) > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_row_without_a_distribution_gives_some_token_and_no_index_out_of_range(value: float) -> None:
    probs_BV = torch.full((3, 600), value)
    probs_BV[1] = torch.eye(600)[5]
    tokens_B = sample(probs_BV, torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    assert tokens_B[1] == 5
    assert ((tokens_B >= 0) & (tokens_B < 600)).all()
