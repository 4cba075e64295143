"""Prepare preferences in the form of Anthropic's HH (Bai et al. 2022, arXiv:2204.05862) for reward models and DPO.

    python examples/hh/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/hh/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.jsonl and FOLDER/test.jsonl

Each example has the texts `chosen` and `rejected`: conversations of turns, each after an empty line and
`Human:` or `Assistant:`, which differ in the last answer. Pairs whose last answers are equal or empty are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hybridflow.data.prepare import Example, HubName, run_from_command_line, text_field
from hybridflow.errors import DataError

HUB = HubName(name="Anthropic/hh-rlhf")
ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")


def messages_of(text: str) -> list[dict[str, str]]:
    """The turns of a conversation."""
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise DataError(f"the conversation does not begin with a turn: {text[:80]!r}")
    return [{"role": ROLES[role], "content": said.strip()} for role, said in zip(parts[0::2], parts[1::2], strict=True)]


def map_row(example: Example, split: str, index: int) -> Mapping[str, object] | None:
    """Both conversations up to the last answer are the prompt."""
    chosen, rejected = messages_of(text_field(example, "chosen")), messages_of(text_field(example, "rejected"))
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        return None
    if chosen[:-1] != rejected[:-1] or chosen[-1] == rejected[-1] or not (chosen[-1]["content"] and rejected[-1]["content"]):
        return None
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
