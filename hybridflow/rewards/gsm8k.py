"""The rule of GSM8K (Cobbe et al. 2021, arXiv:2110.14168): the answer is the number behind `####`.

Only the last 300 characters of a response are read: the answer stands at the end, and regular expressions over a long
text that never ends are slow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.ground_truths import why_no_integer_text

REWARD_NAME = "gsm8k"

CHARACTERS_READ = 300
STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def extract_answer(text: str) -> str | None:
    """What the last `#### ` is followed by, without commas; None where there is no such.

    Example:
        >>> extract_answer('3 boxes of 400. #### 1,200')
        '1200'
    """
    answers = STRICT.findall(text[-CHARACTERS_READ:])
    return _plain(answers[-1]) if answers else None


def compute_score(reward_input: RewardInput) -> Mapping[str, float]:
    """Strict: 1 where the number behind the last `####` equals the ground truth as text, commas and `$` aside, else 0.

    Example:
        >>> compute_score({'response': '#### 7', 'ground_truth': '8', 'data_source': '', 'extra_info': {}})
        {'overall': 0.0, 'accuracy': 0.0, 'format': 1.0}
    """
    answer = extract_answer(reward_input["response"])
    is_correct = answer is not None and answer == _plain(str(reward_input["ground_truth"]))
    return _result(is_correct=is_correct, has_answer=answer is not None)


def compute_score_flexible(reward_input: RewardInput) -> Mapping[str, float]:
    """1 where the last number, wherever it stands, equals the ground truth as a number, else 0.

    Example:
        >>> compute_score_flexible({'response': 'It is 8.0', 'ground_truth': '8', 'data_source': '', 'extra_info': {}})
        {'overall': 1.0, 'accuracy': 1.0, 'format': 1.0}
    """
    numbers = NUMBER.findall(reward_input["response"][-CHARACTERS_READ:])
    if not numbers:
        return _result(is_correct=False, has_answer=False)
    is_correct = _number(numbers[-1]) == _number(str(reward_input["ground_truth"]))
    return _result(is_correct=is_correct, has_answer=True)


def why_unmatchable(ground_truth: object, data_source: str) -> str | None:
    """Why neither rule can find the ground truth in any response; None where one can."""
    problem = why_no_integer_text(ground_truth)
    if problem is None and not NUMBER.fullmatch(_plain(str(ground_truth))):
        return f"{ground_truth!r:.80}, which is no number"
    return problem


def _result(*, is_correct: bool, has_answer: bool) -> Mapping[str, float]:
    return {"overall": float(is_correct), "accuracy": float(is_correct), "format": float(has_answer)}


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "").strip()


def _number(text: str) -> float | str:
    try:
        return float(_plain(text))
    except ValueError:
        return text
