"""One episode as a row under way: turns of the policy and what was appended between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from hybridflow.config.schema import EnvironmentConfig
from hybridflow.environments.base import Message, Row
from hybridflow.environments.child import MethodFailure
from hybridflow.rollout.base import Response
from hybridflow.rollout.stopping import Detokenize
from hybridflow.rollout.under_way import RowUnderWay

Versions = list[tuple[int, int]]


@dataclass(frozen=True)
class ResponsePart:
    """A turn of the policy, or what was appended behind one."""

    is_sampled: bool
    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    """Of a turn, where asked for."""
    versions: Versions
    """Of a turn."""


@dataclass
class Episode(RowUnderWay):
    """A row whose response has several turns. `prompt` is the dataset's until `reset` has given another."""

    given: Row = field(kw_only=True)
    config: EnvironmentConfig = field(kw_only=True)
    prompt_text: str = ""
    is_sampled: list[bool] = field(default_factory=list)
    """Of each of the parts of `tokens`."""
    said: list[Message] = field(default_factory=list)
    """The conversation, that of the prompt included."""
    tools: Sequence[dict[str, object]] = ()
    turn_rewards: list[tuple[int, float]] = field(default_factory=list)
    """(number of response tokens up to the end of the turn, reward)."""
    metrics: dict[str, float] = field(default_factory=dict)
    history_starts: list[int] = field(default_factory=list)
    """Response tokens before each history but the first."""
    turn_start: int = 0
    """Parts before the present turn."""
    history_start: int = 0
    """Parts that belong to earlier histories, which what comes is not sampled behind."""
    past: list[Message] = field(default_factory=list)
    """Conversations of earlier histories, one behind the other."""
    turn_ended_by: Literal["stop", "length"] | None = None
    """While the environment works on the turn."""
    script: deque[ResponsePart] = field(default_factory=deque)
    """What was said before, in a process that is gone: it is said again, as long as the environment answers the same."""
    place: int | None = None
    """Number in the processes of environments; None where it is in none."""
    failure: MethodFailure | None = None

    @property
    def context(self) -> Sequence[npt.NDArray[np.int32]]:
        return self.tokens[self.history_start :] if self.history_start else super().context

    @property
    def present(self) -> Sequence[npt.NDArray[np.int32]]:
        return self.tokens[self.turn_start :]

    @property
    def num_tokens_left(self) -> int:
        left = super().num_tokens_left
        if self.config.max_turn_tokens is None:
            return left
        return min(left, self.config.max_turn_tokens - sum(map(len, self.present)))

    @property
    def num_turns(self) -> int:
        """Turns that the environment has answered."""
        return len(self.turn_rewards)

    @property
    def turn(self) -> npt.NDArray[np.int32]:
        """Tokens of the present turn."""
        return self.joined(self.present, np.int32)

    @property
    def reward(self) -> float:
        """The sum over its turns."""
        return sum(reward for _, reward in self.turn_rewards) if self.failure is None else self.config.failure_reward

    def take_in(self, response: Response, version: int, detokenize: Detokenize) -> None:
        super().take_in(response, version, detokenize)
        self.is_sampled += [True] * (len(self.tokens) - len(self.is_sampled))

    def append(self, tokens: Sequence[int]) -> None:
        """Add what follows the present turn, and begin the next one."""
        self._add(ResponsePart(False, np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), []))
        self.turn_start = len(self.tokens)
        self.turn_ended_by = None

    def begin_history(self, messages: Sequence[Message], tokens: Sequence[int]) -> None:
        """Go on behind these tokens alone, those of `messages`."""
        self.past += self.said
        self.said = list(messages)
        start = len(self.tokens)
        self.append(tokens)
        self.history_start = start
        self.history_starts.append(self.num_tokens - len(tokens))

    def say_again(self, turn: ResponsePart) -> None:
        """Take a turn from the script."""
        self._add(turn)

    def _add(self, part: ResponsePart) -> None:
        if not len(part.tokens):
            return
        self.tokens.append(part.tokens)
        self.is_sampled.append(part.is_sampled)
        if self.sampling.log_probs:
            self.log_probs.append(part.log_probs)
        for version, count in part.versions:
            if self.versions and self.versions[-1][0] == version:
                count += self.versions.pop()[1]
            self.versions.append((version, count))

    def parts(self) -> list[ResponsePart]:
        """Turns and what was appended, in their order; what is still in the script included."""
        masks = [np.full(len(tokens), sampled) for tokens, sampled in zip(self.tokens, self.is_sampled, strict=True)]
        response, mask = self.joined(self.tokens, np.int32), self.joined(masks, np.bool_)
        log_probs = self.joined(self.log_probs, np.float32) if self.log_probs else np.zeros(len(response), np.float32)
        return [*parts_of(response, log_probs, self.versions, mask), *self.script]

    @property
    def ended_by(self) -> Literal["stop", "length"] | None:
        if self.script:
            return "stop" if self.is_last_whole else None
        return self.finish_reason or self.turn_ended_by

    def recorded(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        parts = self.parts()
        versions = np.array([run for part in parts for run in part.versions], np.int64).reshape(-1)
        log_probs = [part.log_probs for part in parts] if self.sampling.log_probs else []
        return self.joined([part.tokens for part in parts], np.int32), self.joined(log_probs, np.float32), versions

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """At each token that `recorded` gives: whether the policy sampled it."""
        return self.joined([np.full(len(part.tokens), part.is_sampled) for part in self.parts()], np.bool_)

    def begin_again(self, parts: Sequence[ResponsePart], *, is_last_whole: bool) -> None:
        """Forget everything and say `parts` again as the environment lets it. The last turn is gone on with, unless it is
        whole."""
        self.tokens, self.log_probs, self.versions, self.is_sampled = [], [], [], []
        self.said, self.past, self.turn_rewards, self.metrics = [], [], [], {}
        self.history_start, self.history_starts = 0, []
        self.turn_start, self.turn_ended_by, self.finish_reason, self.place = 0, None, None, None
        self.script = deque(parts)
        self.is_last_whole = is_last_whole

    is_last_whole: bool = False
    """Whether the last turn of the script has ended."""

    def go_on_from(
        self,
        tokens: npt.NDArray[np.int32],
        log_probs: npt.NDArray[np.float32],
        versions: npt.NDArray[np.int64],
        *,
        finish_reason: Literal["stop", "length"] | None,
        mask: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """An episode is had again by saying it to its environment again. One that failed begins anew."""
        assert mask is not None, "an episode has a mask"
        pairs = [(int(version), int(count)) for version, count in versions.reshape(-1, 2)]
        known = log_probs if len(log_probs) else np.zeros(len(tokens), np.float32)
        parts = parts_of(tokens, known, pairs, mask) if mask.any() else []
        self.begin_again(parts, is_last_whole=finish_reason is not None)

    def fail(self, failure: MethodFailure, *, filler: int) -> None:
        """End as an episode that is not learned from; one that had not begun is the token `filler`."""
        self.failure, self.finish_reason = failure, "stop"
        self.script.clear()
        if not self.tokens:
            self._add(ResponsePart(False, np.array([filler], np.int32), np.zeros(1, np.float32), []))
        self.is_sampled = [False] * len(self.tokens)
        self.versions = []


def parts_of(
    tokens: npt.NDArray[np.int32], log_probs: npt.NDArray[np.float32], versions: Versions, mask: npt.NDArray[np.bool_]
) -> list[ResponsePart]:
    """Cut a response where its mask changes."""
    if not len(tokens):
        return []
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    left, parts = deque(versions), []
    for start, end in pairwise(edges):
        own: Versions = []
        missing = end - start if mask[start] else 0
        while missing:
            version, count = left.popleft()
            taken = min(count, missing)
            own.append((version, taken))
            missing -= taken
            if count > taken:
                left.appendleft((version, count - taken))
        parts.append(ResponsePart(bool(mask[start]), tokens[start:end], log_probs[start:end], own))
    return parts
