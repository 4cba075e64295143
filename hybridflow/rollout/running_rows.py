"""What the torch engine remembers of the requests that run: one row per slot, the first `count` in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hybridflow.rollout.base import FinishReason, Request, Response
from hybridflow.rollout.sampling import SamplingColumns
from hybridflow.rollout.seeds import uniform
from hybridflow.rollout.stopping import Detokenize, StopStrings

Slots = npt.NDArray[np.int64]

ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int64),
        ("min_p", np.float32),
        ("max_tokens", np.int64),
        ("num_prompt", np.int64),
        ("num_generated", np.int64),
        ("token", np.int64),  # the newest, not yet in the cache
        ("is_stopped", np.bool_),
    ]
)


@dataclass(frozen=True)
class Moves:
    """Slots whose contents go to others, so that the running rows are the first ones again."""

    sources: Slots
    targets: Slots
    num_tokens: int
    """In the cache, of the longest that moves."""


class RunningRows:
    """The table. Every method works on whole columns: hundreds of rows cost little more than one."""

    def __init__(self, num_slots: int, max_model_tokens: int, *, end_ids: Sequence[int], detokenize: Detokenize):
        self.end_ids, self.detokenize = tuple(end_ids), detokenize
        self.count = 0
        self.table = np.zeros(num_slots, ROW)
        self.tokens = np.zeros((num_slots, max_model_tokens), np.int32)
        self.log_probs = np.zeros((num_slots, max_model_tokens), np.float32)
        self.stop_ids = np.full((num_slots, max(1, len(end_ids))), -1, np.int64)
        self.requests: npt.NDArray[np.object_] = np.empty(num_slots, object)
        self.stop_strings: npt.NDArray[np.object_] = np.empty(num_slots, object)

    @property
    def num_free(self) -> int:
        return len(self.table) - self.count

    @property
    def running(self) -> Slots:
        """The slots in use: 0 to `count`."""
        return np.arange(self.count)

    def num_cached(self, slots: Slots) -> npt.NDArray[np.int64]:
        """Tokens of each slot that are in the cache: all but the newest."""
        row = self.table[slots]
        cached: npt.NDArray[np.int64] = row["num_prompt"] + np.maximum(row["num_generated"] - 1, 0)
        return cached

    def start(self, requests: Sequence[Request]) -> Slots:
        """Give each request a slot behind those in use."""
        slots = np.arange(self.count, self.count + len(requests))
        for slot, request in zip(slots, requests, strict=True):
            sampling = request.sampling
            self.requests[slot] = request
            self.stop_strings[slot] = StopStrings(sampling.stop, self.detokenize) if sampling.stop else None
            self._set_stop_ids(int(slot), (*(() if sampling.ignore_eos else self.end_ids), *sampling.stop_token_ids))
            self.table[slot] = (
                request.seed % 2**64,
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                sampling.min_p,
                sampling.max_tokens,
                len(request.prompt),
                0,
                -1,
                False,
            )
        self.count += len(requests)
        return slots

    def _set_stop_ids(self, slot: int, ids: Sequence[int]) -> None:
        if (missing := len(ids) - self.stop_ids.shape[1]) > 0:
            self.stop_ids = np.pad(self.stop_ids, ((0, 0), (0, missing)), constant_values=-1)
        self.stop_ids[slot] = -1
        self.stop_ids[slot, : len(ids)] = ids

    def sampling(self, slots: Slots, device: torch.device) -> SamplingColumns:
        """The sampling parameters of the slots, with the random number of each one's next token."""
        row = self.table[slots]
        numbers = uniform(row["seed"], row["num_generated"])
        columns = (row["temperature"], row["top_p"], row["top_k"], row["min_p"], numbers)
        return SamplingColumns(*(torch.from_numpy(column.copy()).to(device) for column in columns))

    def append(self, slots: Slots, tokens: npt.NDArray[np.int64], log_probs: npt.NDArray[np.float32]) -> None:
        """Add one token to each of the slots."""
        at = self.table["num_generated"][slots]
        self.tokens[slots, at], self.log_probs[slots, at] = tokens, log_probs
        self.table["token"][slots] = tokens
        self.table["num_generated"][slots] += 1
        self.table["is_stopped"][slots] = (self.stop_ids[slots] == tokens[:, None]).any(1)
        for slot, watch in zip(slots, self.stop_strings[slots], strict=True):
            if watch is not None and watch.ends_with(int(self.table["token"][slot])):
                self.table["is_stopped"][slot] = True

    def take_finished(self) -> tuple[list[Response], Moves | None]:
        """The responses that have ended; later rows move into their slots, which the cache must follow."""
        row = self.table[: self.count]
        is_done = row["is_stopped"] | (row["num_generated"] >= row["max_tokens"])
        if not is_done.any():
            return [], None
        responses = [
            self._response(int(slot), "stop" if row["is_stopped"][slot] else "length") for slot in np.flatnonzero(is_done)
        ]
        self.count -= len(responses)
        targets = np.flatnonzero(is_done[: self.count])
        sources = self.count + np.flatnonzero(~is_done[self.count :])
        if not len(targets):
            return responses, None
        moves = Moves(sources, targets, int(self.num_cached(sources).max()))
        for column in (self.table, self.tokens, self.log_probs, self.stop_ids, self.requests, self.stop_strings):
            column[targets] = column[sources]
        return responses, moves

    def take_all(self) -> list[Response]:
        """The responses as far as they are; no slot is in use afterwards."""
        responses = [self._response(slot, "interrupted") for slot in range(self.count)]
        self.count = 0
        return responses

    def _response(self, slot: int, finish_reason: FinishReason) -> Response:
        request, row = self.requests[slot], self.table[slot]
        generated = slice(0, int(row["num_generated"]))
        return Response(
            id=request.id,
            tokens=self.tokens[slot, generated].copy(),
            log_probs=self.log_probs[slot, generated].copy() if request.sampling.log_probs else None,
            finish_reason=finish_reason,
        )
