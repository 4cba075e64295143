"""The stream over random durations: nothing older than S, nothing lost, nothing twice, no deadlock."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from hybridflow.batch import Batch
from hybridflow.controller.stream import Stream, StreamSettings, Taken
from hybridflow.errors import CallTimeoutError

P = 4
STEPS = 12


@dataclass
class Source:
    """Prompts 0, 1, 2, ..., each of whose collects takes a time of its own and notes the version that it began with."""

    rng: np.random.Generator
    mean_seconds: float = 0.004
    version: int = 0
    drawn: int = 0
    fails_at: int | None = None
    most_outstanding: int = 0
    running: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def draw(self, step: int, count: int) -> Batch:
        first, self.drawn = self.drawn, self.drawn + count
        seconds = self.rng.lognormal(0.0, 1.5, count) * self.mean_seconds
        return Batch({"prompt_id": np.arange(first, first + count), "seconds": seconds, "group": np.arange(count)})

    def collect(self, prompts: Batch) -> Batch:
        version = np.full(len(prompts), self.version)
        for number, seconds in zip(prompts["prompt_id"].tolist(), prompts["seconds"].tolist(), strict=True):
            if self.fails_at is not None and number >= self.fails_at:
                raise RuntimeError("the engine died")
            time.sleep(min(seconds, 0.05))
        return prompts.with_columns(version=version)


def stream_of(source: Source, *, staleness: int, keep: object = None, steps: int = STEPS) -> Stream:
    settings = StreamSettings(prompts_per_step=P, max_staleness=staleness, total_steps=steps)
    return Stream(settings, source.draw, source.collect, keep or (lambda rows: True))  # type: ignore[arg-type]


def train(stream: Stream, source: Source, *, steps: int = STEPS) -> list[Taken]:
    """Steps of which each takes what the stream gives and learns for a moment."""
    taken = []
    for step in range(1, steps + 1):
        source.version = step - 1
        taken.append(stream.take(step))
        assert len(stream.outstanding) <= stream.settings.max_staleness * P, "more is under way than may be"
        time.sleep(float(source.rng.exponential(0.003)))
    return taken


@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_older_than_allowed_lost_or_taken_twice(staleness: int, seed: int) -> None:
    source = Source(np.random.default_rng([staleness, seed]))
    taken = train(stream_of(source, staleness=staleness), source)
    for step, found in enumerate(taken, start=1):
        assert len(found.rows) == P
        assert (step - 1 - found.rows["version"]).max() <= staleness
    learned = [number for found in taken for number in found.rows["prompt_id"].tolist()]
    assert sorted(learned) == list(range(STEPS * P)), "every prompt that was drawn is learned from exactly once"


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_refused_groups_are_replaced_and_counted(staleness: int) -> None:
    source = Source(np.random.default_rng(staleness))
    stream = stream_of(source, staleness=staleness, keep=lambda rows: rows["prompt_id"][0] % 3 != 0)
    taken = train(stream, source)
    learned = [number for found in taken for number in found.rows["prompt_id"].tolist()]
    assert len(learned) == STEPS * P and not any(number % 3 == 0 for number in learned)
    assert max(Counter(learned).values()) == 1
    refused = sum(found.num_refused for found in taken)
    assert source.drawn == len(learned) + refused, "what was drawn was learned from or refused"
    assert all((step - 1 - found.rows["version"]).max() <= staleness for step, found in enumerate(taken, start=1))


def test_long_groups_are_neither_starved_nor_waited_for_too_early() -> None:
    source = Source(np.random.default_rng(0))
    stream = stream_of(source, staleness=2)
    slow = 1  # of the first step's prompts: it must be learned from at step 3, and not before the quick ones

    def collect(prompts: Batch) -> Batch:
        if prompts["prompt_id"][0] == slow:
            time.sleep(0.3)
        return prompts.with_columns(version=np.array([source.version]))

    stream.collect = collect
    steps = [found.rows["prompt_id"].tolist() for found in train(stream, source)]
    assert slow not in steps[0]
    assert slow in [number for step in steps[:3] for number in step]


def test_groups_that_are_due_together_are_taken_in_time() -> None:
    """With S = 2 a step that only waited for what is too old at the next one would leave 2 P groups to one step."""
    source = Source(np.random.default_rng(0))
    stream = stream_of(source, staleness=2)
    late = threading.Event()

    def collect(prompts: Batch) -> Batch:
        version = source.version
        if P <= prompts["prompt_id"][0] < 3 * P:  # of the first admission, those that the first step has not taken
            late.wait(0.2)
        return prompts.with_columns(version=np.array([version]))

    stream.collect = collect
    taken = train(stream, source)
    ages = [int((step - 1 - found.rows["version"]).max()) for step, found in enumerate(taken, start=1)]
    assert max(ages) <= 2


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_an_engine_that_dies_ends_the_stream_with_its_error(staleness: int) -> None:
    source = Source(np.random.default_rng(0), fails_at=5 * P)
    with pytest.raises(RuntimeError, match="the engine died"):
        train(stream_of(source, staleness=staleness), source)


def test_a_restored_stream_learns_from_what_was_under_way() -> None:
    source = Source(np.random.default_rng(3))
    first = stream_of(source, staleness=2, steps=6)
    before = []
    for step in (1, 2):
        source.version = step - 1
        before += first.take(step).rows["prompt_id"].tolist()
    state = first.state_dict()
    prompts = [group.prompts for group in first.outstanding.values()]
    again = stream_of(source, staleness=2, steps=6)
    assert again.load_state_dict(state, prompts)
    after = []
    for step in range(3, 7):
        source.version = step - 1
        after += again.take(step).rows["prompt_id"].tolist()
    assert sorted(before + after) == list(range(6 * P))


def test_with_another_staleness_what_was_under_way_begins_anew() -> None:
    source = Source(np.random.default_rng(4))
    first = stream_of(source, staleness=2, steps=5)
    before = first.take(1).rows["prompt_id"].tolist()
    state, prompts = first.state_dict(), [group.prompts for group in first.outstanding.values()]
    again = stream_of(source, staleness=0, steps=5)
    assert not again.load_state_dict(state, prompts)
    after = [number for step in range(2, 6) for number in again.take(step).rows["prompt_id"].tolist()]
    assert sorted(before + after) == list(range(5 * P)), "no prompt is lost and none is drawn twice"


def test_collects_that_never_return_end_the_stream_with_what_they_do() -> None:
    settings = StreamSettings(prompts_per_step=P, max_staleness=1, total_steps=STEPS, timeout_s=1.5)
    source, never = Source(np.random.default_rng(0)), threading.Event()

    def hangs_on_odd_prompts(prompts: Batch) -> Batch:
        if prompts["prompt_id"][0] % 2:
            never.wait(60)
        return source.collect(prompts)

    stream = Stream(settings, source.draw, hangs_on_odd_prompts, lambda rows: True)
    started = time.monotonic()
    with pytest.raises(CallTimeoutError, match=r"6 are under way, group 1 the oldest, in wait .*hangs_on_odd_prompts"):
        stream.take(1)
        stream.take(2)
    assert time.monotonic() - started < 30
    never.set()


def test_rows_of_a_pair_are_one_group():
    def draw(step: int, count: int) -> Batch:
        return Batch({"prompt_id": np.repeat(np.arange(count), 2)})

    settings = StreamSettings(prompts_per_step=3, max_staleness=0, total_steps=1)
    taken = Stream(settings, draw, lambda prompts: prompts, lambda group: len(group) == 2).take(1)
    assert taken.rows["group"].tolist() == [0, 0, 1, 1, 2, 2]
