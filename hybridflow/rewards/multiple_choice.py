"""Multiple choice: the letter that a response chooses equals that of the ground truth."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping

from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.ground_truths import why_no_text
from hybridflow.rewards.math import last_boxed

REWARD_NAME = "multiple_choice"

CHARACTERS_READ = 1000
SAID = re.compile(r"(?i:\banswer|\bchoice|\boption)\b[^A-Za-z0-9\n]*(?i:is|:|=)?[^A-Za-z0-9\n]*\(?\b([A-Za-z])\b(?!['’])")
ALONE = re.compile(r"(?:^|\n)\s*[(\[*]*([A-Z])[)\].:*]*\s*(?=\n|$)")
WRITTEN = re.compile(r"\\text\w*\{([^}]*)\}")


def chosen_letter(text: str, letters: str = string.ascii_uppercase) -> str | None:
    r"""The letter in the last `\boxed{}`, else the last behind `answer is` and the like, else the last alone on a line.

    Example:
        >>> chosen_letter("A is tempting, but the answer is (C)."), chosen_letter("B"), chosen_letter("no idea")
        ('C', 'B', None)
    """
    read = text[-CHARACTERS_READ:]
    boxed = last_boxed(read)
    if boxed is not None:
        written = WRITTEN.sub(r"\1", boxed).strip(" ().:*$").upper()
        return written if len(written) == 1 and written in letters else None
    for pattern in (SAID, ALONE):
        found: list[str] = [letter.upper() for letter in pattern.findall(read) if letter.upper() in letters]
        if found:
            return found[-1]
    return None


def compute_score(reward_input: RewardInput, *, letters: str = string.ascii_uppercase) -> Mapping[str, float]:
    """1 where the chosen letter is that of the ground truth, which is a letter, or the number of a choice from 0, else 0."""
    letter = chosen_letter(reward_input["response"], letters)
    is_correct = letter is not None and letter == _truth(reward_input["ground_truth"], letters)
    return {"overall": float(is_correct), "accuracy": float(is_correct), "format": float(letter is not None)}


def why_unmatchable(ground_truth: object, data_source: str) -> str | None:
    """Why no letter equals the ground truth; None where one does."""
    problem = why_no_text(ground_truth)
    if problem is None and _truth(ground_truth, string.ascii_uppercase) is None:
        return f"{ground_truth!r:.80}, which is neither a letter nor the number of a choice"
    return problem


def _truth(ground_truth: object, letters: str) -> str | None:
    if isinstance(ground_truth, int) and 0 <= ground_truth < len(letters):
        return letters[ground_truth]
    letter = str(ground_truth).strip(" ().:").upper()
    return letter if len(letter) == 1 and letter in letters else None
