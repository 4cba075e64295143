"""Episodes on their way through an engine and an environment, many at once.

An episode's next turn is submitted as soon as its own step has been answered; no other is waited for. Everything that happens
to an episode outside of the engine happens on one thread, that of its processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from hybridflow.config.schema import Config
from hybridflow.environments.base import Opening, Outcome
from hybridflow.environments.child import MethodFailure
from hybridflow.environments.episode import Episode
from hybridflow.environments.processes import EnvironmentProcesses, Result
from hybridflow.environments.template import TemplateError, TemplateTokens
from hybridflow.environments.tools import format_of, message_of
from hybridflow.errors import EpisodeError
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.rollout.stopping import detokenizer
from hybridflow.rollout.under_way import RowsUnderWay, RowUnderWay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("hybridflow")

MAX_FAILURES_IN_A_ROW = 32
"""After which the run ends: then it is not an episode that is to blame."""


@dataclass
class Surroundings:
    """What all episodes of a rank share."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    processes: EnvironmentProcesses
    num_failures_in_a_row: int = 0
    has_logged: bool = False
    """Whether a failure of this step has been logged."""

    def __post_init__(self) -> None:
        use_template = self.config.data.apply_chat_template != "never"
        options = self.config.data.chat_template_options
        self.conversations = TemplateTokens(self.tokenizer, use_template=use_template, options=options)
        self.tool_format = format_of(self.config.environment.tool_format, self.tokenizer.chat_template)
        self.special_ids = frozenset(self.tokenizer.all_special_ids)

    def message_of(self, turn: Sequence[int]) -> dict[str, object]:
        """A turn as a message: without the tokens that end it and, where it calls no tools, without other special ones."""
        end = len(turn)
        while end and turn[end - 1] in self.special_ids:
            end -= 1
        said = list(turn[:end])
        message = dict(message_of(self.decode(said, skip_special_tokens=False), self.tool_format))
        if "tool_calls" not in message and not self.special_ids.isdisjoint(said):
            message["content"] = self.decode(said, skip_special_tokens=True)
        return message

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        """The text of tokens, past the tokenizer's Python layer where it has a Rust one."""
        decoder = self.tokenizer.backend_tokenizer if self.tokenizer.is_fast else self.tokenizer
        return str(decoder.decode(tokens, skip_special_tokens=skip_special_tokens))

    def note(self, failure: MethodFailure | None) -> EpisodeError | None:
        """Count an episode that has ended; the error with which to end the run, where all of late have failed."""
        if failure is None:
            self.num_failures_in_a_row = 0
            return None
        self.num_failures_in_a_row += 1
        if not self.has_logged:
            self.has_logged = True
            logger.warning("an episode failed (%s) and is not learned from:\n%s", failure.reason, failure.detail.rstrip())
        if self.num_failures_in_a_row < MAX_FAILURES_IN_A_ROW:
            return None
        return EpisodeError(
            f"the last {MAX_FAILURES_IN_A_ROW} episodes of this rank have all failed. The last one {failure.reason}:\n"
            f"{failure.detail.rstrip()}"
        )


class EpisodesUnderWay(RowsUnderWay):
    """The episodes that one engine works on. Thread-safe."""

    def __init__(self, engine: EngineThread, surroundings: Surroundings):
        super().__init__(engine, detokenizer(surroundings.tokenizer))
        self.around = surroundings
        self.limits = surroundings.config.environment

    def submit(self, rows: Sequence[RowUnderWay]) -> None:
        """Begin episodes; those that have begun elsewhere say again what they had said, as long as the environment answers the
        same."""
        for row in rows:
            row.is_away = True
        with self._starting:
            for row in cast(list[Episode], self._add(rows)):
                self._post(row, self._begin)

    def unfinished(self) -> list[RowUnderWay]:
        with self._starting:  # nothing happens to them meanwhile
            return super().unfinished()

    def _end(self, row: RowUnderWay) -> None:
        """A turn has ended: it is the environment's."""
        episode = cast(Episode, row)
        episode.is_away, episode.turn_ended_by, episode.finish_reason = True, episode.finish_reason, None
        self._post(episode, self._step)

    def _post(self, episode: Episode, job: Callable[[Episode], None]) -> None:
        self.around.processes.post(partial(self._do, episode, job))

    def _do(self, episode: Episode, job: Callable[[Episode], None]) -> None:
        """Do something with an episode on the thread of episodes. What goes wrong there reaches whoever waits for rows."""
        with self._starting:
            try:
                job(episode)
            except TemplateError as error:
                self._fail(episode, MethodFailure("raised", str(error)))
            except BaseException as error:
                self._break(error)

    def _break(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _begin(self, episode: Episode) -> None:
        answered = partial(self._hear, episode, self._open)
        episode.place = self.around.processes.begin(episode.given, answered, partial(self._lose, episode))

    def _hear(self, episode: Episode, job: Callable[[Episode, Result], None], result: Result) -> None:
        self._do(episode, lambda same: self._fail(same, result) if isinstance(result, MethodFailure) else job(same, result))

    def _lose(self, episode: Episode) -> None:
        """The process is gone; the episode says everything again in another once its turn has ended."""
        episode.place = None

    def _open(self, episode: Episode, result: Result) -> None:
        assert isinstance(result, Opening)
        episode.said, episode.tools = list(result.messages), [dict(tool) for tool in result.tools]
        most, tokens = self.around.config.data.max_prompt_tokens, None
        if self.around.conversations.may_fit(result.messages, most):
            episode.prompt_text, tokens = self.around.conversations.opening(result.messages, result.tools)
        if tokens is None or len(tokens) > most:
            found = "too long to be tokenised" if tokens is None else f"{len(tokens)} tokens"
            problem = f"the messages of reset are {found}, more than data.max_prompt_tokens={most}"
            self._fail(episode, MethodFailure("raised", problem))
            return
        episode.prompt = np.array(tokens, np.int32)
        self._next_turn(episode)

    def _next_turn(self, episode: Episode) -> None:
        if episode.script:
            episode.say_again(episode.script.popleft())
            if episode.script or episode.is_last_whole:
                episode.turn_ended_by = "stop"
                self._step(episode)
                return
        episode.is_away = False
        self._start([episode])

    def _step(self, episode: Episode) -> None:
        if episode.place is None:
            episode.begin_again(episode.parts(), is_last_whole=True)
            self._begin(episode)
            return
        message = self.around.message_of(episode.turn.tolist())
        episode.said.append(message)
        self.around.processes.step(episode.place, message, partial(self._hear, episode, self._take))

    def _take(self, episode: Episode, result: Result) -> None:
        assert isinstance(result, Outcome)
        episode.turn_rewards.append((episode.num_tokens, result.reward))
        episode.metrics |= result.metrics
        if result.has_ended or episode.num_turns >= self.limits.max_turns:
            episode.said += result.messages
            self._finish(episode, "stop" if result.terminated else "length")
            return
        left = episode.sampling.max_tokens - episode.num_tokens
        added = self._added(episode, result) if self.around.conversations.may_fit(result.messages, left) else None
        if added is None or len(added) >= left:
            self._finish(episode, "length")
            return
        if episode.script and episode.script.popleft().tokens.tolist() != added:
            episode.script.clear()
        if result.tools is None:
            episode.said += result.messages
            episode.append(added)
        else:
            episode.tools = [dict(tool) for tool in result.tools]
            episode.begin_history(result.messages, added)
        self._next_turn(episode)

    def _added(self, episode: Episode, result: Outcome) -> list[int]:
        """The tokens behind a turn: what follows it, or the whole of a new history."""
        if result.tools is not None:
            return self.around.conversations.opening(result.messages, result.tools)[1]
        return self.around.conversations.appended(episode.said, result.messages, episode.tools, behind=episode.turn.tolist())

    def _fail(self, episode: Episode, failure: MethodFailure) -> None:
        if episode.finish_reason is None:
            episode.fail(failure, filler=self.around.tokenizer.eos_token_id or 0)
            self._finish(episode, "stop")

    def _finish(self, episode: Episode, reason: Literal["stop", "length"]) -> None:
        episode.finish_reason = reason
        if episode.place is not None:
            self.around.processes.end(episode.place)
        if (error := self.around.note(episode.failure)) is not None:
            self._break(error)
        with self._changed:
            super()._end(episode)
            self._changed.notify_all()
