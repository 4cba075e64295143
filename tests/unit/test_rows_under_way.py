"""Rows through interruptions: nothing is lost, and each token has its version, its log-probability and a number of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow.batch import Batch, Ragged
from hybridflow.checkpoint.arrays import load_arrays, save_arrays
from hybridflow.errors import CheckpointError
from hybridflow.rollout.base import EngineSpec, Response, Sampling
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.rollout.stopping import detokenizer
from hybridflow.rollout.torch_engine import TorchEngine
from hybridflow.rollout.under_way import RowsUnderWay, RowUnderWay
from hybridflow.workers.rollout import nothing_said, rows_of, started_columns
from tests.toy import make_tiny_model, make_tiny_tokenizer
from tests.unit.test_engine_contract import forward_log_probs, spec_of, weights_of

LENGTH = 24
SAMPLING = Sampling(temperature=0.8, max_tokens=LENGTH, ignore_eos=True)
TOKENIZER = make_tiny_tokenizer()
DECODE = detokenizer(TOKENIZER)


class SteppedEngine(TorchEngine):
    """Generates only as many steps as it was told; the first gives two tokens, others one."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self.num_steps = 0

    def step(self) -> list[Response]:
        if not self.num_steps:
            time.sleep(0.001)
            return []
        self.num_steps -= 1
        return super().step()


class Generating:
    """Rows under way in an engine that is stepped by hand."""

    def __init__(self, model: str):
        self.engine = SteppedEngine(spec_of(model))
        self.thread = EngineThread(self.engine)
        self.rows = RowsUnderWay(self.thread, DECODE)

    def advance(self, num_tokens: int) -> None:
        """Let the rows that were started last say `num_tokens` tokens, at least two."""
        self.engine.num_steps = num_tokens - 1
        while self.engine.num_steps:
            time.sleep(0.001)

    def interrupt_after(self, num_tokens: int) -> None:
        self.advance(num_tokens)
        self.rows.interrupt()

    def finish(self) -> list[RowUnderWay]:
        self.engine.num_steps = 10**6
        taken = self.rows.take(self.rows.num_left)
        self.engine.num_steps = 0
        return taken

    def load(self, model: str, *, version: int) -> None:
        with self.thread.paused() as engine:
            engine.load_weights(weights_of(model))
        self.rows.version = version


@pytest.fixture
def generating(tiny_model: str) -> Iterator[Generating]:
    generating = Generating(tiny_model)
    yield generating
    generating.thread.close()


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


def rows(count: int = 3, sampling: Sampling = SAMPLING) -> list[RowUnderWay]:
    random = np.random.default_rng(0)
    return [RowUnderWay(n, random.integers(4, 64, 5 + n).astype(np.int32), sampling, seed=100 + n) for n in range(count)]


def said(taken: list[RowUnderWay]) -> list[list[int]]:
    return [np.concatenate(row.tokens).tolist() for row in taken]


def test_what_was_said_before_an_interruption_stays_and_versions_are_runs_that_add_up(
    generating: Generating, other_model: str
) -> None:
    generating.rows.submit(rows())
    without = said(generating.finish())
    generating.rows.submit(rows())
    generating.interrupt_after(7)
    generating.load(other_model, version=4)
    generating.rows.resume()
    taken = generating.finish()
    for row, whole in zip(taken, without, strict=True):
        assert np.concatenate(row.tokens)[:7].tolist() == whole[:7]
        assert np.concatenate(row.tokens).tolist() != whole
        assert row.versions == [(0, 7), (4, LENGTH - 7)]
        assert row.num_tokens == LENGTH and row.finish_reason == "length"


def test_interruptions_under_the_same_weights_are_one_run(generating: Generating) -> None:
    generating.rows.submit(rows())
    for num_tokens in (3, 5):
        generating.interrupt_after(num_tokens)
        generating.rows.resume()
    assert [row.versions for row in generating.finish()] == [[(0, LENGTH)]] * 3


def test_log_probs_are_those_of_the_weights_that_sampled_each_token(
    generating: Generating, tiny_model: str, other_model: str
) -> None:
    generating.rows.submit(rows())
    generating.interrupt_after(9)
    generating.load(other_model, version=1)
    generating.rows.resume()
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tiny_model, other_model)]
    for row in generating.finish():
        whole = Response(id=0, tokens=np.concatenate(row.tokens), log_probs=None, finish_reason="length")
        before, after = (forward_log_probs(model, row.prompt, whole, SAMPLING.temperature) for model in models)
        torch.testing.assert_close(torch.from_numpy(np.concatenate(row.log_probs)), torch.cat([before[:9], after[9:]]))


def test_greedy_rows_go_on_as_if_they_had_not_been_interrupted(generating: Generating) -> None:
    greedy = Sampling(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    generating.rows.submit(rows(3, greedy))
    without = said(generating.finish())
    generating.rows.submit(rows(3, greedy))
    generating.interrupt_after(11)
    generating.rows.resume()
    assert said(generating.finish()) == without


def test_no_two_requests_of_a_row_draw_the_same_numbers() -> None:
    (row,) = rows(1)
    seeds = [row.request(0).seed]
    for _ in range(5):
        one = Response(id=0, tokens=np.array([9], np.int32), log_probs=None, finish_reason="interrupted")
        row.take_in(one, 0, DECODE)
        seeds.append(row.request(0).seed)
    assert len(set(seeds)) == 6
    assert row.request(0).sampling.max_tokens == LENGTH - 5
    assert row.request(0).prompt.tolist() == [*row.prompt.tolist(), *[9] * 5]


def batch_of(asked: list[RowUnderWay]) -> Batch:
    batch = Batch.from_columns({"prompt": Ragged.from_rows([row.prompt for row in asked], np.int32)})
    numbers = np.array([row.number for row in asked])
    return batch.with_columns(position=numbers, seed=100 + numbers, call=np.zeros(len(asked), np.int64))


def test_rows_go_on_after_a_restart_from_what_was_saved_of_them(generating: Generating, tmp_path: Path) -> None:
    asked = batch_of(rows())
    generating.rows.submit(rows_of(asked, SAMPLING))
    generating.interrupt_after(6)
    save_arrays(tmp_path / "said.npz", started_columns(generating.rows.unfinished()))
    generating.rows.resume()
    expected = generating.finish()
    restored = rows_of(asked.join(load_arrays(tmp_path / "said.npz")), SAMPLING)
    assert said(restored) != said(expected) and [row.num_tokens for row in restored] == [6] * 3
    generating.rows.submit(restored)
    found = generating.finish()
    assert said(found) == said(expected)
    assert [row.versions for row in found] == [row.versions for row in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.concatenate(one.log_probs), np.concatenate(other.log_probs))


def test_restored_rows_that_had_ended_are_there_at_once_and_others_begin(generating: Generating) -> None:
    asked = batch_of(rows(2))
    generating.rows.submit(rows_of(asked.select([0]), SAMPLING))
    ended = started_columns(generating.finish())
    columns = Batch.concatenate([ended, nothing_said(1).with_columns(position=np.array([1]))])
    generating.rows.submit(rows_of(asked.join(columns), SAMPLING))
    (first,) = generating.rows.take(1)
    assert (first.number, first.finish_reason, first.num_tokens) == (0, "length", LENGTH)
    (second,) = generating.finish()
    assert (second.number, second.num_tokens) == (1, LENGTH)


@pytest.mark.parametrize("num_tokens", range(2, 9))
def test_a_stop_string_is_found_wherever_an_interruption_cuts_it(generating: Generating, num_tokens: int) -> None:
    # What greedy rows say without a stop string, of which characters 5 to 8 become one.
    greedy = Sampling(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)
    generating.rows.submit(rows(1, greedy))
    (whole,) = said(generating.finish())
    stop = DECODE(whole[4:8])
    end = next(index for index in range(LENGTH + 1) if stop in DECODE(whole[:index]))
    generating.rows.submit(rows(1, Sampling(temperature=0.0, max_tokens=LENGTH, ignore_eos=True, stop=(stop,))))
    generating.interrupt_after(min(num_tokens, end - 1))
    generating.rows.resume()
    (row,) = generating.finish()
    assert np.concatenate(row.tokens).tolist() == whole[:end]
    assert row.finish_reason == "stop" and row.versions == [(0, end)]
    assert sum(map(len, row.log_probs)) == end


def test_a_stop_string_that_new_weights_complete_is_found() -> None:
    (row,) = rows(1, Sampling(max_tokens=LENGTH, stop=("def",)))
    for text, reason in (("abcd", "interrupted"), ("ef and more", "length")):
        tokens = np.array(TOKENIZER(text)["input_ids"], np.int32)
        row.take_in(Response(id=0, tokens=tokens, log_probs=np.zeros(len(tokens)), finish_reason=reason), len(text), DECODE)
    assert DECODE(np.concatenate(row.tokens).tolist()) == "abcdef"
    assert row.finish_reason == "stop"
    assert row.versions == [(4, 4), (11, 2)]
    assert sum(map(len, row.log_probs)) == 6


def test_what_has_finished_is_handed_out_beyond_what_was_waited_for(generating: Generating) -> None:
    lengths = [2, 2, LENGTH, 2]
    asked = [RowUnderWay(n, np.array([5], np.int32), Sampling(max_tokens=m, ignore_eos=True), n) for n, m in enumerate(lengths)]
    generating.rows.submit(asked)
    generating.advance(3)
    assert [row.number for row in generating.rows.take(1)] == [0, 1, 3]
    assert generating.rows.num_left == 1
    assert generating.rows.take(0) == [], "nothing to wait for"
    assert generating.rows.take(1, timeout_s=0.01) == [], "the time was over"


def test_rows_submitted_while_others_are_held_start_with_them(generating: Generating) -> None:
    generating.rows.submit(rows(1))
    generating.interrupt_after(4)
    generating.rows.submit(rows(2)[1:])
    assert not generating.engine.num_unfinished
    assert [row.num_tokens for row in generating.rows.unfinished()] == [4, 0]
    generating.rows.resume()
    assert [row.num_tokens for row in generating.finish()] == [LENGTH] * 2


def test_a_row_that_the_engine_refuses_is_handed_out_with_the_reason_and_others_go_on(generating: Generating) -> None:
    asked = rows(2)
    generating.rows.submit([asked[0], RowUnderWay(7, np.empty(0, np.int32), SAMPLING, 0), asked[1]])
    taken = {row.number: row for row in generating.finish()}
    assert "0 prompt tokens" in (taken[7].refusal or "")
    assert [row.refusal for row in taken.values() if row.number != 7] == [None, None]
    assert all(row.num_tokens for row in taken.values() if row.number != 7)


def test_arrays_come_back_as_they_were_saved(tmp_path: Path) -> None:
    tokens = Ragged.from_rows([[1, 2], [], [3]], np.int32)
    batch = Batch.from_columns({"response": tokens, "rollout_log_probs": Ragged(tokens.values / 2, tokens.offsets)})
    batch = batch.with_columns(position=np.array([7, 8, 9]), is_known=np.array([True, False, True]))
    save_arrays(tmp_path / "a.npz", batch)
    found = load_arrays(tmp_path / "a.npz")
    assert set(found.names) == set(batch.names)
    for name in batch.per_row:
        np.testing.assert_array_equal(found[name], batch[name])
        assert found[name].dtype == batch[name].dtype
    for name in ("response", "rollout_log_probs"):
        assert [row.tolist() for row in found.tokens(name)] == [row.tolist() for row in batch.tokens(name)]
        assert found.tokens(name).values.dtype == batch.tokens(name).values.dtype


@pytest.mark.parametrize("damage", ["missing", "cut", "of something else", "flipped"])
def test_a_damaged_file_of_arrays_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npz"
    save_arrays(path, Batch.from_columns({"response": Ragged.from_rows([list(range(99))], np.int32)}))
    whole = path.read_bytes()
    flipped = bytes([*whole[:200], whole[200] ^ 255, *whole[201:]])
    match damage:
        case "missing":
            path.unlink()
        case _:
            path.write_bytes({"cut": whole[:-40], "of something else": b"{}", "flipped": flipped}[damage])
    with pytest.raises(CheckpointError, match=r"a\.npz cannot be read"):
        load_arrays(path)
