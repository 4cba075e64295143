"""Multiple choice, exact match, format and length; reference answers against themselves and against each other's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hybridflow.config.schema import RewardConfig
from hybridflow.rewards.call import load_reward_function
from hybridflow.rewards.multiple_choice import chosen_letter
from tests.unit.test_rewards import given

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not REAL_DATA.exists(), reason="the real datasets are not in ../shared/data")


def reward(name: str, response: str, truth: object, **options: object) -> float:
    return load_reward_function(RewardConfig(name=name, options=options)).score(given(response, truth)).reward


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (C).", "C"),
        ("Answer: B", "B"),
        ("**Answer:** D", "D"),
        (r"so \boxed{\text{A}}", "A"),
        (r"\boxed{(E)}", "E"),
        (r"The answer is B, no: \boxed{C}", "C"),
        ("I think A. But the correct option is b", "B"),
        ("A\nB\nC", "C"),
        ("(D)", "D"),
        ("A good answer needs thought", None),
        ("the answer is a's", None),
        ("", None),
        (r"\boxed{42}", None),
    ],
)
def test_the_letter_that_is_chosen(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize("truth", ["C", "c", "(C)", 2])
def test_a_choice_is_a_letter_or_a_number(truth: object) -> None:
    assert reward("multiple_choice", "Answer: C", truth) == 1.0
    assert reward("multiple_choice", "Answer: B", truth) == 0.0


def test_exact_match_compares_as_text() -> None:
    assert reward("exact_match", "The Eiffel-Tower!", "eiffeltower") == 1.0
    assert reward("exact_match", "Paris", ["paris", "Lutetia"]) == 1.0
    assert reward("exact_match", "Paris", "paris", normalise=False) == 0.0
    tagged = "<answer>x</answer> no: <answer>Paris</answer>"
    assert reward("exact_match", tagged, "Paris", pattern="<answer>(.*?)</answer>") == 1.0
    assert reward("exact_match", "Paris", "Paris", pattern="<answer>(.*?)</answer>") == 0.0


def test_the_format_is_that_of_the_whole_response() -> None:
    assert reward("format", "<think>so\nso</think>\n<answer>2</answer>", None) == 1.0
    assert reward("format", "I <think>so</think><answer>2</answer>", None) == 0.0
    assert reward("format", "<think>a</think><answer>1</answer><answer>2</answer>", None) == 0.0
    assert reward("format", "yes", None, pattern="yes|no", once=[]) == 1.0


@pytest.mark.parametrize(("num_tokens", "expected"), [(10, 0.0), (80, 0.0), (85, -0.25), (100, -1.0), (200, -1.0)])
def test_length_is_punished_from_the_buffer_on(num_tokens: int, expected: float) -> None:
    row = given()
    row["response_tokens"] = num_tokens
    # 80 tokens are free, and 20 more lead to -1: 5 of 20 are a quarter.
    function = load_reward_function(RewardConfig(name="length", options={"max_tokens": 100, "buffer_tokens": 20}))
    assert function.score(row).reward == expected


@pytest.mark.real_data
@needs_data
def test_references_of_gsm8k_are_right_themselves_and_wrong_for_each_other() -> None:
    rows = [json.loads(line) for line in next((REAL_DATA / "gsm8k").glob("test*.jsonl")).open()]
    assert len(rows) == 1319
    truths = [re.split(r"####\s*", row["answer"])[-1].strip() for row in rows]
    for name in ("gsm8k", "gsm8k_flexible"):
        rule = load_reward_function(RewardConfig(name=name))
        own = [rule.score(given(row["answer"], truth)).reward for row, truth in zip(rows, truths, strict=True)]
        others = [rule.score(given(row["answer"], truths[n - 1])).reward for n, row in enumerate(rows)]
        assert sum(own) == 1319
        assert sum(others) / 1319 < 0.05


@pytest.mark.real_data
@needs_data
def test_references_of_math_500_are_right_themselves_and_wrong_for_each_other() -> None:
    pytest.importorskip("math_verify")
    rows = [json.loads(line) for line in (REAL_DATA / "math500" / "test.jsonl").open()]
    rule = load_reward_function(RewardConfig(name="math"))

    def boxed(row: dict[str, str]) -> str:
        return rf"so it is $\boxed{{{row['answer']}}}$."

    own = [rule.score(given(boxed(row), row["answer"])).reward for row in rows]
    others = [rule.score(given(boxed(row), rows[n - 1]["answer"])).reward for n, row in enumerate(rows)]
    assert (len(rows), sum(own)) == (500, 500)
    assert sum(others) / 500 < 0.05
