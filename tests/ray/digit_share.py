"""A reward that untrained models get different amounts of: the share of digits among a response's characters."""


def compute_score(reward_input: dict[str, object], **options: object) -> dict[str, float]:
    """`overall` is the share; `characters` becomes a metric."""
    response = str(reward_input["response"])
    digits = sum(character.isdigit() for character in response)
    return {"overall": digits / max(len(response), 1), "characters": float(len(response))}
