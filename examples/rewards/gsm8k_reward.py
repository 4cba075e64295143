r"""A reward function that is called once for each response: accuracy, with the format as a metric beside it.

    reward.path=examples/rewards/gsm8k_reward.py

The answer is the last `\boxed{}`, else what `<answer>` holds, else the last number. `format_weight` mixes the format into the
reward: reward.options.format_weight=0.1
"""

import re

REWARD_NAME = "gsm8k"
REWARD_TYPE = "sequential"

PATTERNS = (
    re.compile(r"\\boxed\{([^{}]+)\}"),
    re.compile(r"<answer>(.*?)</answer>", re.DOTALL),
    re.compile(r"(-?\d[\d,]*(?:\.\d+)?)"),
)


def extract_answer(response: str) -> str | None:
    """The last match of the first pattern that matches."""
    for pattern in PATTERNS:
        if found := pattern.findall(response):
            return found[-1].strip()
    return None


def is_same(answer: str, ground_truth: str) -> bool:
    """Equal as numbers (1,000 is 1000, 42 is 42.0), or as text where one is no number."""
    try:
        return abs(float(answer.replace(",", "")) - float(ground_truth.replace(",", ""))) < 1e-6
    except ValueError:
        return answer == ground_truth.strip()


def compute_score(reward_input, *, format_weight=0.0, **kwargs):
    """`overall` is the reward; every other number becomes the metric reward/NAME."""
    response = reward_input["response"]
    answer = extract_answer(response)
    accuracy = float(answer is not None and is_same(answer, reward_input["ground_truth"]))
    has_format = float(any(pattern.search(response) for pattern in PATTERNS[:2]))
    return {
        "overall": (1 - format_weight) * accuracy + format_weight * has_format,
        "accuracy": accuracy,
        "format": has_format,
    }
