"""A reward function that sees all responses of a step on its rank at once: right answers, the shorter the better.

    reward.path=examples/rewards/batch_reward.py

One call gets a list and returns a list of the same length. Its time limit is reward.timeout_s for each response of the list.
"""

REWARD_NAME = "short_and_right"
REWARD_TYPE = "batch"


def compute_score(reward_inputs, *, length_weight=0.2, **kwargs):
    """1 for a right answer, less up to `length_weight` by its length among the right answers."""
    is_right = [str(each["ground_truth"]) in each["response"].split()[-1:] for each in reward_inputs]
    lengths = [len(each["response"]) for each in reward_inputs]
    right_lengths = [length for length, right in zip(lengths, is_right, strict=True) if right]
    shortest, longest = min(right_lengths, default=0), max(right_lengths, default=0)
    results = []
    for length, right in zip(lengths, is_right, strict=True):
        excess = (length - shortest) / max(longest - shortest, 1)
        results.append({"overall": (1 - length_weight * excess) if right else 0.0, "accuracy": float(right)})
    return results
