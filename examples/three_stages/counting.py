"""The task of the three stages: its data files, and its true score as a reward function.

    python examples/three_stages/counting.py --folder DIR --seed 0

writes a pupil's careless counting, and which of two countings a teacher prefers.

The task: go on counting from the last digit of a number, six digits long; `472` is answered by `345678`. Files, in DIR:
`chats.parquet` and `chats_held_out.parquet` for supervised fine-tuning, `preferences.parquet` and
`preferences_held_out.parquet` for the reward model and DPO, `prompts.parquet` and `validation.parquet` for PPO. No number is
both in a held-out or validation file and in another.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

NUM_DIGITS = 6
DIGITS = "0123456789"
NUM_HELD_OUT = 200
"""Of the 1,000 numbers of three digits."""
CARE = 0.55
"""How often a pupil counts right."""
CLEAR = 3 / NUM_DIGITS - 1e-9
"""Least difference of the true scores of a pair."""
CHATS_PER_NUMBER, PAIRS_PER_NUMBER = 3, 12
Row = Mapping[str, object]


def true_score(number: str, response: str) -> float:
    """The share of right steps, between 0 and 1; digits too many or too few are wrong ones.

    Example: to `472`, `345678` scores 1, `345699` scores 4 / 6.
    """
    steps = zip(number[-1] + response, response, strict=False)
    right = sum(a in DIGITS and b in DIGITS and int(b) == (int(a) + 1) % 10 for a, b in steps)
    return min(right, NUM_DIGITS) / max(NUM_DIGITS, len(response))


def compute_score(reward_input: Mapping[str, object], *, weight: float = 0.0) -> dict[str, float]:
    """The true score as a metric, and `reward.options.weight` times it as reward: by default only a reward model's counts."""
    score = true_score(str(reward_input["ground_truth"]), str(reward_input["response"]))
    return {"overall": weight * score, "true_score": score}


def careless(number: str, draw: random.Random) -> str:
    """What a pupil writes: each digit follows the one before it, or is any digit."""
    digits = [int(number[-1])]
    for _ in range(NUM_DIGITS):
        digits.append((digits[-1] + 1) % 10 if draw.random() < CARE else draw.randrange(10))
    return "".join(map(str, digits[1:]))


def chat(number: str, draw: random.Random) -> Row:
    """A conversation of one question and one answer."""
    return {"messages": [{"role": "user", "content": number}, {"role": "assistant", "content": careless(number, draw)}]}


def preference(number: str, draw: random.Random) -> Row:
    """Two answers of clearly different worth, the better one chosen."""
    while True:
        pair = sorted((careless(number, draw) for _ in range(2)), key=lambda response: true_score(number, response))
        if true_score(number, pair[1]) - true_score(number, pair[0]) >= CLEAR:
            rejected, chosen = ([{"role": "assistant", "content": response}] for response in pair)
            return {"prompt": [{"role": "user", "content": number}], "chosen": chosen, "rejected": rejected}


def prompt(number: str) -> Row:
    """A question; the ground truth is the number itself, which the true score counts from."""
    return {
        "data_source": "counting",
        "prompt": [{"role": "user", "content": number}],
        "reward_model": {"style": "rule", "ground_truth": number},
    }


def make_files(seed: int) -> dict[str, list[Row]]:
    """The rows of every file; a function of `seed`."""
    draw = random.Random(seed)
    numbers = [f"{number:03d}" for number in range(1000)]
    draw.shuffle(numbers)
    held_out, train = numbers[:NUM_HELD_OUT], numbers[NUM_HELD_OUT:]
    return {
        "chats": [chat(number, draw) for number in train * CHATS_PER_NUMBER],
        "chats_held_out": [chat(number, draw) for number in held_out],
        "preferences": [preference(number, draw) for number in train * PAIRS_PER_NUMBER],
        "preferences_held_out": [preference(number, draw) for number in held_out * 2],
        "prompts": [prompt(number) for number in train],
        "validation": [prompt(number) for number in held_out],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description="Write the files of the three stages.")
    parser.add_argument("--folder", type=Path, required=True, help="where the files go")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in make_files(options.seed).items():
        path = options.folder / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
