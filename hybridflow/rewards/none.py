"""No rule: the whole reward is what the role `reward_model` reads."""

from __future__ import annotations

from hybridflow.rewards.call import RewardInput

REWARD_NAME = "none"


def compute_score(reward_input: RewardInput) -> float:
    """0 for every response."""
    return 0.0
