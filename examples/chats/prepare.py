"""Prepare chats for supervised fine-tuning.

    python examples/chats/prepare.py --local_dir DIR                     # from the Hugging Face hub
    python examples/chats/prepare.py --local_dir DIR --source FOLDER     # from FOLDER/train.jsonl and FOLDER/test.jsonl

Each example has `messages` with `role` and `content`, or `conversations` with `from` and `value` (ShareGPT), or `conversation`.
Content may be a list of parts, whose texts are joined. Chats in which the assistant says nothing are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from hybridflow.data.prepare import Example, HubName, run_from_command_line
from hybridflow.errors import DataError

HUB = HubName(name="HuggingFaceTB/smoltalk", config="everyday-conversations")
COLUMNS = ("messages", "conversations", "conversation")
SAME = ("system", "user", "assistant", "tool")
ROLES = {**{role: role for role in SAME}, "human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool"}


def map_row(example: Example, split: str, index: int) -> Mapping[str, object] | None:
    """The chat in one form."""
    turns = next((example[name] for name in COLUMNS if example.get(name)), None)
    if not isinstance(turns, list):
        raise DataError(f"expected a list of turns as one of {', '.join(COLUMNS)}, found a {type(turns).__name__}")
    messages = [{"role": _role(turn), "content": _text(turn.get("content", turn.get("value")))} for turn in turns]
    if not any(message["role"] == "assistant" and message["content"].strip() for message in messages):
        return None
    return {"messages": messages}


def _role(turn: Mapping[str, object]) -> str:
    role = str(turn.get("role", turn.get("from")))
    if role not in ROLES:
        raise DataError(f"a turn is of {role!r}; known are {', '.join(ROLES)}")
    return ROLES[role]


def _text(content: object) -> str:
    """What a turn says."""
    if not isinstance(content, list):
        return str(content or "")
    if other := [part for part in content if part.get("type", "text") != "text"]:
        raise DataError(f"a turn has a part of type {other[0]['type']!r}; only text is read")
    return "".join(str(part["text"]) for part in content)


if __name__ == "__main__":
    run_from_command_line(map_row, hub=HUB)
