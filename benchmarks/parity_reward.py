"""A cheap reward with some variance for models with random weights: half of all responses get 1."""


def compute_score(reward_input: dict[str, object], **kwargs: object) -> dict[str, float]:
    """1 where the codes of the response's characters add up to an even number."""
    return {"overall": float(sum(map(ord, str(reward_input["response"]))) % 2 == 0)}
