"""Prepare GSM8K (Cobbe et al. 2021, arXiv:2110.14168) for training.

    python examples/gsm8k/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/gsm8k/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.jsonl and FOLDER/test.jsonl

writes DIR/train.parquet and DIR/test.parquet. Each example has the fields question and answer, the answer ending in
`#### NUMBER`. The column `response` is read by supervised fine-tuning only.
"""

from __future__ import annotations

from hybridflow.data.prepare import Example, HubName, PreparedRow, run_from_command_line, text_field
from hybridflow.errors import DataError
from hybridflow.rewards.gsm8k import extract_answer

HUB = HubName(name="openai/gsm8k", config="main")
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'


def map_row(example: Example, split: str, index: int) -> PreparedRow:
    """One problem, with the instruction behind the question."""
    question, answer = text_field(example, "question"), text_field(example, "answer")
    ground_truth = extract_answer(answer)
    if ground_truth is None:
        raise DataError(f"the answer does not end in '#### NUMBER': {answer[-80:]!r}")
    return PreparedRow(
        prompt=[{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        ground_truth=ground_truth,
        data_source="openai/gsm8k",
        extra_info={"split": split, "index": index, "question": question, "answer": answer},
        response=answer,
    )


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
