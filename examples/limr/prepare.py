r"""Prepare a list of problems with answers in the form of LIMR (Li et al. 2025, arXiv:2502.11886).

    python examples/limr/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/limr/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.json, a list of objects

Each example has a question (`prompt`, `problem` or `question`) and an `answer`.
"""

from __future__ import annotations

from hybridflow.data.prepare import Example, HubName, PreparedRow, run_from_command_line

HUB = HubName(name="GAIR/LIMR")
INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."
QUESTION_FIELDS = ("prompt", "problem", "question")


def map_row(example: Example, split: str, index: int) -> PreparedRow | None:
    """A problem, or None without an answer."""
    question = next((str(example[name]) for name in QUESTION_FIELDS if example.get(name)), None)
    answer = str(example["answer"]).strip()
    if not answer:
        return None
    if question is None:
        raise KeyError(QUESTION_FIELDS[0])
    return PreparedRow(
        prompt=[{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        ground_truth=answer,
        data_source="lighteval/MATH",
        extra_info={"split": split, "index": index},
    )


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
