"""Files in other forms that the field knows: what they are, and how to write them in ours."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ANSWERED = frozenset({"messages", "response", "chosen", "reward_model"})
"""A file with one of these columns is in one of our forms, whatever else it has."""
CHATS = "chats in another form. examples/chats/prepare.py writes them as a column 'messages'"
PAIRS = "pairs under other names. Call the columns 'prompt', 'chosen' and 'rejected'"
PROBLEMS = (
    "problems with answers. examples/new_dataset/prepare.py makes of them 'prompt', and 'reward_model' with a ground_truth; "
    "to learn the answers call them 'response'"
)


@dataclass(frozen=True)
class Form:
    """Columns, and what to do with them."""

    columns: frozenset[str]
    advice: str
    unless: frozenset[str] = ANSWERED
    """Columns beside which they mean nothing."""


FORMS = (
    Form(frozenset({"conversations"}), CHATS),
    Form(frozenset({"conversation"}), CHATS),
    Form(
        frozenset({"completion", "label"}),
        "single answers with a label, as for KTO. Put a good and a bad answer to each prompt into one row, as 'chosen' and "
        "'rejected': algorithm.loss=kto of dpo learns from these",
    ),
    Form(
        frozenset({"completion"}),
        "answers to learn. Call texts 'response'; put messages behind those of the prompt, as 'messages'",
    ),
    Form(frozenset({"response_j", "response_k"}), PAIRS),
    Form(frozenset({"chosen_response", "rejected_response"}), PAIRS),
    Form(frozenset({"question", "chosen", "rejected"}), PAIRS, unless=frozenset({"prompt"})),
    Form(
        frozenset({"response_0", "response_1"}),
        "pairs with the number of the better answer. Put that into 'chosen' and the other into 'rejected'",
    ),
    Form(
        frozenset({"completions"}),
        "several answers with ratings. Put the best to a prompt into 'chosen' and a worse one into 'rejected'",
    ),
    Form(
        frozenset({"instruction", "output"}),
        "instructions in Alpaca's form. 'prompt' is the instruction with the input behind it, 'response' the output",
    ),
    *(Form(frozenset({asked, "answer"}), PROBLEMS) for asked in ("question", "problem", "prompt")),
    Form(frozenset({"problem", "solution"}), PROBLEMS),
    Form(frozenset({"input", "label"}), PROBLEMS),
    Form(frozenset({"ground_truth"}), "what 'reward_model' should hold, a struct with the field ground_truth"),
    Form(frozenset({"text"}), "plain text. Cut it into a 'prompt' and the 'response' to learn", unless=ANSWERED | {"prompt"}),
)
"""The first that fits counts."""
IMAGES = "images"
PICTURES = f"{IMAGES}: pictures, which are not read: the model would see the text alone"


def advice(columns: Iterable[str]) -> str:
    """What to do with a file of these columns; nothing where they are in no form that is known.

    Example:
        >>> advice(["prompt", "response_j", "response_k"])
        "response_j, response_k: pairs under other names. Call the columns 'prompt', 'chosen' and 'rejected'"
    """
    names = set(columns)
    fitting = next((form for form in FORMS if form.columns <= names and not form.unless & names), None)
    return f"{', '.join(sorted(fitting.columns))}: {fitting.advice}" if fitting else ""
