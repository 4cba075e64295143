"""What answers are worth, and the files that they are kept in."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hybridflow.batch import Batch
from hybridflow.controller.measures import Answers, Estimate, as_metrics, majority_at_k, pass_at_k
from hybridflow.data.rollouts import write_rows
from hybridflow.rewards.answers import answer_of


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response():
    correct = np.array([[True, False, True, False, False]])
    for k in range(1, 6):
        subsets = list(itertools.combinations(correct[0], k))
        assert pass_at_k(correct, k)[0] == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_the_majority_is_the_most_frequent_answer_of_each_run():
    correct = np.array([[True, False, False, True], [False, False, True, True]])
    answers = np.array([[1, 2, 2, 1], [5, 6, 1, 1]])
    assert majority_at_k(correct, answers, 4).tolist() == [1.0, 1.0]  # 1 and 2 twice each: 1 came first
    assert majority_at_k(correct, answers, 2).tolist() == [0.5, 0.5]  # of two that differ the first


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    for draw in (lambda: (rng.random(200) < 0.9).astype(float), lambda: rng.beta(2, 1, 200)):
        mean = 0.9 if set(np.unique(draw())) <= {0.0, 1.0} else 2 / 3
        found = [Estimate.of(draw()) for _ in range(400)]
        assert 0.92 < np.mean([estimate.low <= mean <= estimate.high for estimate in found]) < 0.98
    assert Estimate.of(np.ones(10)).low < 0.8 < Estimate.of(np.ones(10)).high


def test_sources_are_told_apart():
    answers = Answers(
        rewards=np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
        answers=np.arange(6),
        sources=["a/b", "a/b", "c", "c", "c", "c"],
        responses_per_prompt=2,
        correct_reward=1.0,
    )
    found = answers.estimates([1, 2])
    assert list(found) == ["all", "a/b", "c"]
    assert found["all"]["accuracy"].value == pytest.approx(0.5)
    assert (found["a/b"]["accuracy"].value, found["c"]["pass@2"].value) == (1.0, 0.5)
    assert {"accuracy", "accuracy/low", "pass@2", "a_b/accuracy", "c/majority@2/high"} <= set(as_metrics(found))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("#### 1,200", "1200"),
        ("The answer is (B).", "B"),
        ("It is 3, or rather 4.", "4"),
        ("yes", "yes"),
    ],
)
def test_an_answer_is_found(response: str, answer: str):
    assert answer_of(response) == answer


def test_rollouts_are_read_with_pandas(tmp_path: Path):
    rows = Batch.from_columns(
        {
            "prompt_text": ["1+1=", "2+2="],
            "response_text": ["2", "5"],
            "ground_truth": ["2", {"value": 4}],
            "extra_info": [{"a": 1}, {}],
            "data_source": ["sums", None],
            "reward": np.array([1.0, 0.0], np.float32),
            "reward/accuracy": np.array([1.0, np.nan], np.float32),
        }
    )
    write_rows(rows, tmp_path / "rollouts" / "3.parquet")
    frame = pd.read_parquet(tmp_path / "rollouts" / "3.parquet")
    assert frame["response_text"].tolist() == ["2", "5"]
    assert frame["reward"].tolist() == [1.0, 0.0]
    assert frame["ground_truth"].tolist() == ["2", '{"value": 4}']
