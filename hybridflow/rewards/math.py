r"""The rule of MATH (Hendrycks et al. 2021, arXiv:2103.03874): the last `\boxed{}` equals the ground truth as mathematics.

Equality is decided by math-verify, an optional package.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from hybridflow.errors import RewardError
from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.ground_truths import why_no_text

try:  # at import, so that the seconds it takes do not count against the first response's time limit
    import math_verify
except ImportError:
    math_verify = None

REWARD_NAME = "math"

BOXED = "\\boxed{"

# It warns at each process's first call that it runs without its own time limit; the process pool has one.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{...}` holds, braces inside it matched; None where there is no such.

    Example:
        >>> last_boxed(r'so \boxed{1} or \boxed{\frac{1}{2}}')
        '\\frac{1}{2}'
    """
    start = text.rfind(BOXED)
    while start >= 0:
        depth = 0
        for position in range(start + len(BOXED) - 1, len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0) if text[position - 1] != "\\" else 0
            if depth == 0:
                return text[start + len(BOXED) : position]
        start = text.rfind(BOXED, 0, start)
    return None


def compute_score(reward_input: RewardInput) -> Mapping[str, float]:
    r"""1 where the last `\boxed{}` equals the ground truth, else 0.

    Raises:
        RewardError: math-verify is not installed.
    """
    answer = last_boxed(reward_input["response"])
    is_correct = answer is not None and is_equal(answer, str(reward_input["ground_truth"]))
    return {"overall": float(is_correct), "accuracy": float(is_correct), "format": float(answer is not None)}


def why_unmatchable(ground_truth: object, data_source: str) -> str | None:
    """Why no answer equals the ground truth; None where one can."""
    return why_no_text(ground_truth)


def is_equal(answer: str, ground_truth: str) -> bool:
    """Whether two pieces of LaTeX mean the same.

    Raises:
        RewardError: math-verify is not installed.
    """
    if math_verify is None:
        raise RewardError("the reward rule 'math' needs the package math-verify: pip install math-verify")
    if answer.strip() == ground_truth.strip():
        return True  # also for what has no mathematics in it, such as a name
    # Its own limits use signals, which only work in a main thread; None switches them off.
    gold, given = (math_verify.parse(f"${BOXED}{text}}}$", parsing_timeout=None) for text in (ground_truth, answer))
    return bool(math_verify.verify(gold, given, timeout_seconds=None))
