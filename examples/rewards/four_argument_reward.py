"""A reward function with four arguments that returns a number.

reward.path=examples/rewards/four_argument_reward.py
"""


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """1 where the response ends with the ground truth, a tenth of that where it holds it anywhere."""
    if solution_str.rstrip(" .\n").endswith(str(ground_truth)):
        return 1.0
    return 0.1 if str(ground_truth) in solution_str else 0.0
