"""Rows on their way through an engine: from submission to the last token, however often generation is interrupted.

When weights change, what a row has said so far stays, and it goes on as a new request whose prompt ends with those tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hybridflow.errors import RequestRefusedError
from hybridflow.rollout.base import Request, Response, Sampling
from hybridflow.rollout.seeds import mixed_seed
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.rollout.stopping import Detokenize, end_across

GATHERED_S = 0.02
"""What finishes within this time is handed out together."""


@dataclass
class RowUnderWay:
    """One row, and what it has said so far."""

    number: int
    """By which whoever submitted it knows it again."""
    prompt: npt.NDArray[np.int32]
    sampling: Sampling
    """Its own: `max_tokens` may be less than others may say."""
    seed: int
    tokens: list[npt.NDArray[np.int32]] = field(default_factory=list)
    log_probs: list[npt.NDArray[np.float32]] = field(default_factory=list)
    """As many as tokens, where asked for."""
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(policy version, number of tokens) in the order of the tokens."""
    finish_reason: Literal["stop", "length"] | None = None
    refusal: str | None = None
    """Why the engine does not generate it: such a row is handed out, too."""
    is_away: bool = False
    """Waiting for something else than the engine."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def num_tokens_left(self) -> int:
        """That the next request may say."""
        return self.sampling.max_tokens - self.num_tokens

    @property
    def context(self) -> Sequence[npt.NDArray[np.int32]]:
        """Parts of what the next token is sampled behind."""
        return [self.prompt, *self.tokens]

    @property
    def present(self) -> Sequence[npt.NDArray[np.int32]]:
        """Parts of what a stop string is looked for in."""
        return self.tokens

    @staticmethod
    def joined(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Parts end to end; there may be none."""
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    @property
    def ended_by(self) -> Literal["stop", "length"] | None:
        """For a row that is to go on elsewhere: whether what it has said last is whole."""
        return self.finish_reason

    def recorded(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """What it has said, as `go_on_from` takes it: tokens, log-probabilities, versions."""
        versions = np.array(self.versions, np.int64).reshape(-1)
        return self.joined(self.tokens, np.int32), self.joined(self.log_probs, np.float32), versions

    def go_on_from(
        self,
        tokens: npt.NDArray[np.int32],
        log_probs: npt.NDArray[np.float32],
        versions: npt.NDArray[np.int64],
        *,
        finish_reason: Literal["stop", "length"] | None,
    ) -> None:
        """Take over what the row has said elsewhere, such as before a restart; `versions` are pairs end to end."""
        if len(tokens):
            self.tokens, self.log_probs = [tokens], [log_probs] if len(log_probs) else []
            self.versions = [(int(version), int(count)) for version, count in versions.reshape(-1, 2)]
        self.finish_reason = finish_reason

    def request(self, number: int) -> Request:
        """For what is left to say. The seed depends on how much has been said, so that no random number is used twice."""
        so_far = self.num_tokens
        left = replace(self.sampling, max_tokens=self.num_tokens_left)
        if not so_far:
            return Request(id=number, prompt=self.prompt, sampling=left, seed=self.seed)
        (seed,) = mixed_seed(np.array([self.seed]), np.array([so_far])).tolist()
        return Request(id=number, prompt=np.concatenate(self.context), sampling=left, seed=seed)

    def take_in(self, response: Response, version: int, detokenize: Detokenize) -> None:
        """Add what one request has given. It may have gone on behind the end of a stop string that an earlier request began:
        what is behind is dropped."""
        kept = len(response.tokens)
        if response.finish_reason != "interrupted":
            self.finish_reason = response.finish_reason
        if self.present and self.sampling.stop:
            so_far, whole = sum(map(len, self.present)), np.concatenate([*self.present, response.tokens]).tolist()
            if (end := end_across(so_far, whole, self.sampling.stop, detokenize)) is not None:
                kept, self.finish_reason = end - so_far, "stop"
        if not kept:
            return
        self.tokens.append(response.tokens[:kept])
        if response.log_probs is not None:
            self.log_probs.append(response.log_probs[:kept])
        if self.versions and self.versions[-1][0] == version:
            kept += self.versions.pop()[1]
        self.versions.append((version, kept))


class RowsUnderWay:
    """The rows that one engine works on. Thread-safe.

    Ranks that share an engine may differ in the order in which they find rows finished; only the answers of one are read.
    """

    def __init__(self, engine: EngineThread, detokenize: Detokenize):
        self.engine, self.detokenize = engine, detokenize
        self.version = 0
        """Of the policy whose weights the engine has."""
        self._changed = threading.Condition()
        self._starting = threading.RLock()
        """Held by whoever starts rows, from the look at `is_held` until the engine has them: an interruption comes before or
        after. Never taken by the engine's thread."""
        self._rows: dict[int, RowUnderWay] = {}
        self._finished: list[RowUnderWay] = []
        self._failure: BaseException | None = None
        self._is_held = False

    @property
    def num_left(self) -> int:
        """Rows that were submitted and not yet taken."""
        with self._changed:
            return len(self._rows) + len(self._finished)

    def submit(self, rows: Sequence[RowUnderWay]) -> None:
        """Start rows, or let them go on; those that have ended already are there to be taken at once."""
        with self._starting:
            self._start(self._add(rows))

    def _add(self, rows: Sequence[RowUnderWay]) -> list[RowUnderWay]:
        """Note rows as under way; those of them that the engine is to be given."""
        with self._changed:
            fresh = [row for row in rows if row.finish_reason is None]
            self._finished += [row for row in rows if row.finish_reason is not None]
            known = [row.number for row in fresh if row.number in self._rows]
            assert not known, f"rows {known[:5]} are under way already"
            self._rows |= {row.number: row for row in fresh}
            self._changed.notify_all()
        return fresh

    def take(self, at_least: int, timeout_s: float | None = None) -> list[RowUnderWay]:
        """Rows that have ended or were refused, once there are `at_least` of them, or all that are left, or after `timeout_s`.

        Raises:
            EngineError: the engine has failed.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while len(self._finished) < min(at_least, len(self._rows) + len(self._finished)):
                if self._failure is not None:
                    raise self._failure
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if until is not None and self._finished and self._rows:
                self._changed.wait_for(lambda: not self._rows, GATHERED_S)
            if self._failure is not None:
                raise self._failure
            taken, self._finished = self._finished, []
        return sorted(taken, key=lambda row: row.number)

    def interrupt(self) -> None:
        """Stop all rows between two steps of the engine; they keep what they have said, and wait for `resume`."""
        with self._starting, self._changed:
            self._is_held = True
        self.engine.interrupt()

    def resume(self) -> None:
        """Let interrupted rows go on, with the weights that the engine has now."""
        with self._starting:
            with self._changed:
                if not self._is_held:
                    return
                self._is_held = False
                waiting = [row for row in self._rows.values() if not row.is_away]
            self._start(waiting)

    def unfinished(self) -> list[RowUnderWay]:
        """The rows that have not ended, while they are interrupted."""
        with self._changed:
            assert self._is_held, "rows are read between interrupt and resume"
            return [*self._finished, *self._rows.values()]

    @property
    def is_held(self) -> bool:
        """Whether rows wait for `resume`."""
        return self._is_held

    def _start(self, rows: Sequence[RowUnderWay]) -> None:
        """Give rows to the engine, or leave them to `resume`."""
        with self._starting:
            if self._is_held or not rows:
                return
            futures = self.engine.submit([row.request(index) for index, row in enumerate(rows)])
        for row, future in zip(rows, futures, strict=True):
            future.add_done_callback(partial(self._note, row, self.version))

    def _note(self, row: RowUnderWay, version: int, future: Future[Response]) -> None:
        error = future.exception()
        with self._changed:
            if isinstance(error, RequestRefusedError):
                row.refusal = str(error)
                RowsUnderWay._end(self, row)  # whatever a subclass does with rows that the engine has answered
            elif error is not None:
                self._failure = error
            else:
                row.take_in(future.result(), version, self.detokenize)
                if row.finish_reason is not None:
                    self._end(row)
            self._changed.notify_all()

    def _end(self, row: RowUnderWay) -> None:
        """The engine has ended a row. Called with the lock, on the engine's thread."""
        del self._rows[row.number]
        self._finished.append(row)


class RowsElsewhere(RowsUnderWay):
    """On a rank that follows another (EngineThread, `follows`), which has the rows."""

    def submit(self, rows: Sequence[RowUnderWay]) -> None:
        """The other rank submits them."""

    def interrupt(self) -> None:
        """The other rank interrupts them."""

    def take(self, at_least: int, timeout_s: float | None = None) -> list[RowUnderWay]:
        """The other rank has them."""
        return []

    def unfinished(self) -> list[RowUnderWay]:
        return []
