"""What a configuration scores with: one reward function, or the weighted sum of several.

Plain functions run on the main thread, where signals and event loops of their own work. Coroutines run on a thread with one
event loop for the life of the process, so that clients and their connections can be kept from call to call.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from hybridflow.config.schema import RewardConfig, RewardTerm
from hybridflow.errors import RewardError
from hybridflow.rewards.call import Kind, RewardFunction, RewardInput, load_reward_function
from hybridflow.rewards.ground_truths import is_for, why_unscored
from hybridflow.rewards.results import MAIN_KEYS, TAKEN_METRICS, Failure, Score, as_list, as_score, finite, trace_of

Result = Score | Failure | None
"""Of one function for one response; None where it says that it does not apply."""
Begun = Callable[[], Result]
"""Waits for a result that is under way."""


@dataclass(frozen=True)
class Term:
    """A loaded function with what the configuration says of it."""

    label: str
    function: RewardFunction
    config: RewardTerm

    def applies_to(self, reward_input: RewardInput) -> bool:
        """Whether the function scores rows of this data source."""
        return is_for(self.config, str(reward_input["data_source"]))


class ScoringTimeoutError(Exception):
    """A coroutine has had its time."""


class Coroutines:
    """A thread that runs coroutines, `concurrency` at a time, each for at most `timeout_s`."""

    def __init__(self, *, concurrency: int, timeout_s: float):
        self.timeout_s = timeout_s
        self._places = asyncio.Semaphore(concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, awaitable: Awaitable[object], *, num_rows: int = 1) -> Future[object]:
        """Begin; the future raises what the coroutine raises, or ScoringTimeoutError."""

        async def limited() -> object:
            async with self._places:
                try:
                    async with asyncio.timeout(self.timeout_s * num_rows) as limit:
                        return await awaitable
                except TimeoutError as error:  # which may also be the function's own
                    if limit.expired():
                        raise ScoringTimeoutError from error
                    raise

        if self._loop is None:  # not before it is needed: a process without threads may fork
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="hybridflow-coroutines").start()
        return asyncio.run_coroutine_threadsafe(limited(), self._loop)


class Scorer:
    """Scores responses as `reward` says.

    Raises:
        RewardError: a function cannot be loaded, or two share a label.
    """

    def __init__(self, config: RewardConfig):
        self.config = config
        functions = [load_reward_function(term) for term in config.terms]
        self.terms = [
            Term(term.label or function.name, function, term) for term, function in zip(config.terms, functions, strict=True)
        ]
        self.is_sum = bool(config.functions)
        if self.is_sum:
            _check_labels([term.label for term in self.terms])
        limits = [function.concurrency for function in functions if function.concurrency]
        self.concurrency = min([config.concurrency, *limits])
        self.coroutines = Coroutines(concurrency=self.concurrency, timeout_s=config.timeout_s)

    @property
    def name(self) -> str:
        return " + ".join(term.label for term in self.terms)

    @property
    def kind(self) -> Kind:
        """Batch where any function wants many responses at once."""
        return "batch" if any(term.function.kind == "batch" for term in self.terms) else "sequential"

    @property
    def is_async(self) -> bool:
        """Whether more than one response can be under way at once."""
        return any(term.function.is_async for term in self.terms)

    def begin(self, reward_input: RewardInput) -> Callable[[], Score | Failure]:
        """Begin to score one response, by sequential functions; calling what is returned waits for the end. Plain functions
        have ended when this returns.

        Raises:
            RewardError: the response cannot be scored at all; also by what is returned.
        """
        begun = [self._begin(term, reward_input) if term.applies_to(reward_input) else None for term in self.terms]
        return lambda: self._sum(
            [result and result() for result in begun], [result is not None for result in begun], reward_input
        )

    def score_all(self, reward_inputs: Sequence[RewardInput]) -> list[Score | Failure]:
        """The scores of many responses, by functions of either kind. Raises as `begin` does."""
        results: list[list[Result]] = [[None] * len(self.terms) for _ in reward_inputs]
        for number, term in enumerate(self.terms):
            rows = [row for row, given in enumerate(reward_inputs) if term.applies_to(given)]
            given = [reward_inputs[row] for row in rows]
            found = self._all(term, given) if term.function.kind == "batch" else self._each(term, given)
            for row, result in zip(rows, found, strict=True):
                results[row][number] = result
        return [
            self._sum(row, [term.applies_to(given) for term in self.terms], given)
            for row, given in zip(results, reward_inputs, strict=True)
        ]

    def _each(self, term: Term, reward_inputs: Sequence[RewardInput]) -> list[Result]:
        begun = [self._begin(term, reward_input) for reward_input in reward_inputs]
        return [result() for result in begun]

    def _begin(self, term: Term, reward_input: RewardInput) -> Begun:
        def call() -> object:
            return term.function.call(dict(reward_input))

        return self._protected(call, _as_result, num_rows=1)

    def _all(self, term: Term, reward_inputs: Sequence[RewardInput]) -> list[Result]:
        """By a batch function: a result that is none fails alone, all fail where the function does."""
        found: list[Result] = []

        def keep(results: object) -> Result:
            found.extend(_protected_result(result) for result in as_list(results, len(reward_inputs)))
            return None

        def call() -> object:
            return term.function.call([dict(reward_input) for reward_input in reward_inputs])

        failure = self._protected(call, keep, num_rows=len(reward_inputs))() if reward_inputs else None
        return [failure] * len(reward_inputs) if failure is not None else found

    def _protected(self, call: Callable[[], object], read: Callable[[object], Result], *, num_rows: int) -> Begun:
        """Call now, read the result later; what goes wrong in either becomes a failure."""
        try:
            result = call()
            if not inspect.isawaitable(result):
                found = read(result)
                return lambda: found
            future = self.coroutines.submit(result, num_rows=num_rows)
        except RewardError:
            raise
        except BaseException as error:  # Ctrl-C does not reach this process: whatever comes is of the function
            failure = Failure("raised", trace_of(error))
            return lambda: failure

        def wait() -> Result:
            try:
                return read(future.result())
            except RewardError:
                raise
            except ScoringTimeoutError:
                return Failure("timed out", f"no result within reward.timeout_s={self.config.timeout_s:g}")
            except BaseException as error:
                return Failure("raised", trace_of(error))

        return wait

    def _sum(self, results: Sequence[Result], applied: Sequence[bool], reward_input: RewardInput) -> Score | Failure:
        """One score from those of all functions."""
        if not any(applied):
            raise RewardError(str(why_unscored(self.config, str(reward_input["data_source"]))))
        parts = [(term, result) for term, result in zip(self.terms, results, strict=True) if isinstance(result, Score)]
        failures = [(term, result) for term, result in zip(self.terms, results, strict=True) if isinstance(result, Failure)]
        if failures:
            term, failure = failures[0]
            return Failure(failure.reason, f"{term.label}: {failure.detail}") if self.is_sum else failure
        try:
            return self._weighted(parts) if self.is_sum else parts[0][1] if parts else as_score(None)
        except (TypeError, ValueError) as error:
            return Failure("raised", trace_of(error))

    def _weighted(self, parts: Sequence[tuple[Term, Score]]) -> Score:
        if not parts:
            raise ValueError("every function returned None: none of them gives this response a reward")
        metrics = {term.label: score.reward for term, score in parts}
        for term, score in parts:
            metrics |= {f"{term.label}/{name}": value for name, value in score.metrics.items() if name not in MAIN_KEYS}
        return Score(finite(sum(term.config.weight * score.reward for term, score in parts)), metrics)


def _as_result(result: object) -> Result:
    return None if result is None else as_score(result)


def _protected_result(result: object) -> Result:
    try:
        return _as_result(result)
    except (TypeError, ValueError) as error:
        return Failure("raised", trace_of(error))


def _check_labels(labels: Sequence[str]) -> None:
    """Raises:
    RewardError: two functions share a label, or one has a name that is taken.
    """
    for number, label in enumerate(labels):
        if label in labels[:number] or label in TAKEN_METRICS:
            whose = "of the reward itself" if label in TAKEN_METRICS else "of another function"
            raise RewardError(f"reward.functions: {label!r} is the name {whose}. Set `label` on one of them")
