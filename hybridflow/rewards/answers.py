"""What a response answers, as text: for counting votes."""

from __future__ import annotations

import re

from hybridflow.rewards.gsm8k import extract_answer
from hybridflow.rewards.math import last_boxed

CHARACTERS_READ = 2000
NAMED = re.compile(r"answer\s*(?:is|:)\s*\**\(?([^\s.,*)]+)", re.IGNORECASE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def answer_of(response: str) -> str:
    r"""The last `\boxed{}`, else what follows the last `####`, else what `answer is` or `answer:` names, else the last number,
    else the whole response; without spaces and the commas of numbers.

    Example:
        >>> answer_of("So 1,200 in all. The answer is 1,200."), answer_of("#### 7"), answer_of("yes")
        ('1200', '7', 'yes')
    """
    text = response[-CHARACTERS_READ:]
    named = NAMED.findall(text)
    numbers = NUMBER.findall(text)
    last_number = numbers[-1] if numbers else None
    found = last_boxed(text) or extract_answer(text) or (named[-1] if named and not numbers else last_number) or text
    return "".join(found.split()).replace(",", "")
