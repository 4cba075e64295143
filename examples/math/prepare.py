r"""Prepare MATH (Hendrycks et al. 2021, arXiv:2103.03874) for training.

    python examples/math/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/math/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.jsonl and FOLDER/test.jsonl

writes DIR/train.parquet and DIR/test.parquet. Each example has the field problem, and answer or solution; of a solution the
last `\boxed{}` is the answer, and the solution becomes the column `response`, read by supervised fine-tuning only.
"""

from __future__ import annotations

from hybridflow.data.prepare import Example, HubName, PreparedRow, run_from_command_line, text_field
from hybridflow.errors import DataError
from hybridflow.rewards.math import BOXED, last_boxed

HUB = HubName(name="DigitalLearningGmbH/MATH-lighteval")
INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def map_row(example: Example, split: str, index: int) -> PreparedRow:
    """One problem, with the instruction behind it unless it brings one."""
    problem = text_field(example, "problem")
    solution = text_field(example, "solution") if "solution" in example else None
    return PreparedRow(
        prompt=[{"role": "user", "content": problem if BOXED in problem else f"{problem} {INSTRUCTION}"}],
        ground_truth=_ground_truth(example, solution),
        data_source=HUB.name,
        extra_info={"split": split, "index": index, "problem": problem},
        response=solution,
    )


def _ground_truth(example: Example, solution: str | None) -> str:
    if "answer" in example or solution is None:
        return text_field(example, "answer")
    answer = last_boxed(solution)
    if answer is None:
        raise DataError(rf"the solution has no \boxed{{}} and there is no field 'answer': {solution[-80:]!r}")
    return answer


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
