"""Says when no response or episode of a step has ended by itself: nothing that ends one is ever rewarded then."""

from __future__ import annotations

import logging

from hybridflow.batch import Batch

logger = logging.getLogger("hybridflow")


class CutOffWarning:
    """Warns once where such steps begin, and again where they begin anew."""

    def __init__(self, max_response_tokens: int, *, max_turns: int, is_sampled: bool = True):
        """`is_sampled` says that the responses are the policy's, and not the dataset's."""
        self.max_response_tokens, self.max_turns, self.is_sampled = max_response_tokens, max_turns, is_sampled
        self.is_so = False

    def look(self, step: int, rows: Batch) -> None:
        """At the rows of a step."""
        was_so, self.is_so = self.is_so, "truncated" in rows and len(rows) > 0 and bool(rows["truncated"].all())
        if not self.is_so or was_so:
            return
        if "environment/turns" in rows:
            logger.warning(
                "step %d: all %d episodes were ended by a limit, none by the environment. Raise environment.max_turns (%d) or "
                "data.max_response_tokens (%d), or let `step` return terminated",
                *(step, len(rows), self.max_turns, self.max_response_tokens),
            )
            return
        if not self.is_sampled:
            logger.warning(
                "step %d: all %d answers of the dataset were cut at data.max_response_tokens (%d): nothing teaches where one "
                "ends. Raise it",
                *(step, len(rows), self.max_response_tokens),
            )
            return
        logger.warning(
            "step %d: all %d responses were cut off by the length limit, none has ended by itself. Raise "
            "data.max_response_tokens (%d), or look at what ends a response: the chat template's end of turn, "
            "rollout.stop, rollout.stop_token_ids, rollout.ignore_eos",
            *(step, len(rows), self.max_response_tokens),
        )
