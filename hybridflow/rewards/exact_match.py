"""Exact match: the answer in a response equals the ground truth, or one of several, as text."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence

from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.ground_truths import why_no_text

REWARD_NAME = "exact_match"

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces: as SQuAD compares (Rajpurkar et al. 2016,
    arXiv:1606.05250).

    Example:
        >>> normalised("The  Eiffel Tower.")
        'eiffel tower'
    """
    plain = unicodedata.normalize("NFKC", text).lower().translate(PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", plain).split())


def compute_score(reward_input: RewardInput, *, pattern: str | None = None, normalise: bool = True) -> Mapping[str, float]:
    """1 where the answer equals the ground truth or, where that is a list, any of it, else 0.

    The answer is the whole response or, with `pattern`, what the first group of the regular expression holds where it matches
    last: `pattern="<answer>(.*?)</answer>"`. `normalise=False` compares as it stands, spaces around it aside.
    """
    answer = _answer(reward_input["response"], pattern)
    truths = reward_input["ground_truth"]
    listed = truths if isinstance(truths, Sequence) and not isinstance(truths, str) else [truths]
    same = normalised if normalise else str.strip
    is_correct = answer is not None and same(answer) in [same(str(truth)) for truth in listed]
    return {"overall": float(is_correct), "accuracy": float(is_correct), "format": float(answer is not None)}


def _answer(response: str, pattern: str | None) -> str | None:
    if pattern is None:
        return response
    matches = list(re.finditer(pattern, response, re.DOTALL))
    return matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None


def why_unmatchable(ground_truth: object, data_source: str) -> str | None:
    """Why no answer equals the ground truth; None where one can. A list is one of several right answers."""
    if isinstance(ground_truth, list) and ground_truth:
        problems = [why_no_text(truth) for truth in ground_truth]
        return None if None in problems else f"a list of nothing but {problems[0]}"
    return why_no_text(ground_truth)
