"""The rule that belongs to the dataset which a prompt comes from, so that several can be mixed."""

from __future__ import annotations

from collections.abc import Mapping

from hybridflow.errors import RewardError
from hybridflow.registry import nearest
from hybridflow.rewards import gsm8k, math
from hybridflow.rewards.call import RewardInput

REWARD_NAME = "by_data_source"

RULES = {
    "openai/gsm8k": gsm8k.compute_score,
    "hybridflow/arithmetic": gsm8k.compute_score,
    "lighteval/MATH": math.compute_score,
    "DigitalLearningGmbH/MATH-lighteval": math.compute_score,
    "HuggingFaceH4/MATH-500": math.compute_score,
}


CHECKS = {
    **dict.fromkeys(("openai/gsm8k", "hybridflow/arithmetic"), gsm8k.why_unmatchable),
    **dict.fromkeys(("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "HuggingFaceH4/MATH-500"), math.why_unmatchable),
}


def why_unmatchable(ground_truth: object, data_source: str) -> str | None:
    """As the rule of the data source says; `why_unscored` tells of one that no rule belongs to."""
    return CHECKS[data_source](ground_truth, data_source) if data_source in CHECKS else None


def why_unscored(data_source: str) -> str | None:
    """What is wrong with a data source that no rule belongs to."""
    if data_source in RULES:
        return None
    return (
        f"no reward rule belongs to data_source {data_source!r}{nearest(data_source, RULES) or '.'} Known: {', '.join(RULES)}. "
        "Set reward.name to one rule for all data, or reward.path to a file with a function compute_score of your own"
    )


def compute_score(reward_input: RewardInput) -> Mapping[str, float]:
    """The score by the rule of the data source.

    Raises:
        RewardError: no rule belongs to it.
    """
    source = str(reward_input["data_source"])
    if problem := why_unscored(source):
        raise RewardError(problem)
    return RULES[source](reward_input)
