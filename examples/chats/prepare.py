"""Prepare chats for supervised fine-tuning.

    python examples/chats/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/chats/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.jsonl and FOLDER/test.jsonl

Each example has `messages` with `role` and `content`, or `conversations` with `from` and `value` (ShareGPT). Chats in which the
assistant says nothing are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from hybridflow.data.prepare import Example, HubName, run_from_command_line
from hybridflow.errors import DataError

HUB = HubName(name="HuggingFaceTB/smoltalk", config="everyday-conversations")
ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def map_row(example: Example, split: str, index: int) -> Mapping[str, object] | None:
    """The chat in one form."""
    turns = example["messages"] if example.get("messages") else example["conversations"]
    if not isinstance(turns, list):
        raise DataError(f"expected a list of turns, found a {type(turns).__name__}")
    messages = [{"role": _role(turn), "content": str(turn.get("content", turn.get("value")) or "")} for turn in turns]
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return None
    return {"messages": messages}


def _role(turn: Mapping[str, object]) -> str:
    role = str(turn.get("role", turn.get("from")))
    if role not in ROLES:
        raise DataError(f"a turn is of {role!r}; known are {', '.join(ROLES)}")
    return ROLES[role]


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
