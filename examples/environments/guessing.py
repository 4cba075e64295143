"""A guessing game: the environment has thought of a digit, and says of each guess whether it is higher or lower.

python -m hybridflow.train configs/guessing.yaml        # after examples/environments/make_toy.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Message = dict[str, object]


class GuessingGame:
    """The reward is 1 for the right digit within `environment.max_turns` guesses."""

    def reset(self, row: Mapping[str, object]) -> tuple[Sequence[Message], dict[str, object]]:
        """The prompt as it is in the dataset."""
        self.secret = int(str(row["ground_truth"]))
        return row["messages"], {}  # type: ignore[return-value]

    def step(self, message: Message) -> tuple[list[Message], float, bool, bool, dict[str, object]]:
        """Compare a guess."""
        said = str(message["content"]).strip()
        if said == str(self.secret):
            return [], 1.0, True, False, {"solved": 1}
        if len(said) != 1 or said not in "0123456789":
            return [{"role": "user", "content": "digit?"}], 0.0, False, False, {"solved": 0}
        hint = "higher" if int(said) < self.secret else "lower"
        return [{"role": "user", "content": hint}], 0.0, False, False, {"solved": 0}
