"""Terms of a reward that look at the form of a response alone: its format and its length."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hybridflow.rewards.call import RewardInput

THINKING = r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*"


def format_score(
    reward_input: RewardInput, *, pattern: str = THINKING, once: Sequence[str] = ("</think>", "<answer>", "</answer>")
) -> float:
    """1 where the whole response matches the regular expression `pattern`, in which `.` is any character, and each text of
    `once` stands in it at most once, else 0. The default is `<think>...</think> <answer>...</answer>`, DeepSeek-R1 (2025,
    arXiv:2501.12948).

    Example:
        >>> format_score({'response': '<think>2 + 2</think> <answer>4</answer>'}), format_score({'response': '4'})
        (1.0, 0.0)
    """
    response = reward_input["response"]
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None and all(response.count(text) <= 1 for text in once))


def length_score(reward_input: RewardInput, *, max_tokens: int, buffer_tokens: int = 0) -> Mapping[str, float]:
    """0 up to `max_tokens - buffer_tokens` tokens, then falling by a line to -1 at `max_tokens`, and -1 beyond: the soft
    overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13). Its weight says how much it counts.

    Example:
        >>> length_score({'response_tokens': 90}, max_tokens=100, buffer_tokens=20)
        {'overall': -0.5, 'overlong': 1.0}
    """
    num_tokens = reward_input["response_tokens"]
    over = num_tokens - (max_tokens - buffer_tokens)
    score = 0.0 if over <= 0 else -1.0 if over >= buffer_tokens else -over / buffer_tokens
    return {"overall": score, "overlong": float(over > 0)}
