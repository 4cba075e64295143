r"""Prepare a dataset of your own: copy this file, and change HUB and `map_row`.

    python examples/new_dataset/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/new_dataset/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.jsonl and FOLDER/test.jsonl

`map_row` is the one hook: it is called with each example as the dataset has it, and returns what training reads, or None to
leave the example out. docs/data.md says what each field means. This one maps LIMR (competition problems with a prompt and an
answer); a field that an example lacks is reported with the fields that it has.
"""

from __future__ import annotations

from hybridflow.data.prepare import Example, HubName, PreparedRow, run_from_command_line, text_field

HUB = HubName(name="GAIR/LIMR")
INSTRUCTION = r"Let's think step by step and output the final answer within \boxed{}."


def map_row(example: Example, split: str, index: int) -> PreparedRow | None:
    """What training reads of `example`, the `index`th of `split` ("train" or "test")."""
    answer = str(example["answer"]).strip()
    if not answer:
        return None
    return PreparedRow(
        # The prompt: chat messages, or a string where the model has no chat template.
        prompt=[{"role": "user", "content": f"{text_field(example, 'prompt')} {INSTRUCTION}"}],
        # What the reward function compares the response with.
        ground_truth=answer,
        # Chooses the rule where reward.name is by_data_source: a name of hybridflow/rewards/by_data_source.py.
        # For any other name set reward.name (here: math), or reward.path to a function of your own.
        data_source="lighteval/MATH",
        # Handed to the reward function as it stands; the same fields with the same types in every row.
        extra_info={"split": split, "index": index},
    )


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
