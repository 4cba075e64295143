"""Groups: what a call on the controller does on the ranks."""

import logging
import re
import socket
import time
from concurrent.futures import Future as ThreadFuture

import numpy as np
import pytest
import ray

from benchmarks.dispatch import in_store
from hybridflow.batch import Batch, Ragged
from hybridflow.controller.group import GroupDispatcher, Pool
from hybridflow.errors import CallTimeoutError, WorkerDiedError, WorkerError
from hybridflow.workers.remote import CombinedFuture
from tests.ray.conftest import make_group


def rows(lengths: list[int]) -> Batch:
    tokens = [np.full(length, index, np.int32) for index, length in enumerate(lengths)]
    columns = {"response": Ragged.from_rows(tokens, np.int32), "response_tokens": np.array(lengths)}
    return in_store(Batch.from_columns(columns))


def test_rows_come_back_in_the_order_in_which_they_went_out(pool: Pool) -> None:
    doubled = make_group(pool).double(rows([3, 50, 1, 2, 40]))
    assert [row.tolist()[0] for row in doubled.tokens("doubled")] == [0, 2, 4, 6, 8]
    assert set(doubled["rank"].tolist()) == {0, 1}


def test_ranks_get_equal_tokens_not_equal_rows(pool: Pool) -> None:
    # One row of 100 tokens against five of 20: either rank gets 100.
    doubled = make_group(pool).double(rows([100, 20, 20, 20, 20, 20]))
    assert len(set(doubled["rank"][1:].tolist())) == 1
    assert doubled["rank"][0] != doubled["rank"][1]


def test_a_rank_without_rows_is_called_all_the_same(pool: Pool) -> None:
    doubled = make_group(pool).double(rows([3]))
    assert doubled.tokens("doubled")[0].tolist() == [0, 0, 0]


def test_results_can_be_joined_and_sent_on(pool: Pool) -> None:
    group = make_group(pool)
    batch = rows([3, 50, 1, 2, 40])
    joined = batch.join(group.double(batch)).select([4, 0])
    again = group.double(joined)
    assert [len(row) for row in again.tokens("doubled")] == [40, 3]


def test_metrics_of_ranks_are_merged(pool: Pool) -> None:
    # 96 tokens in 5 rows: the mean counts rows, not ranks.
    assert dict(make_group(pool).count(rows([3, 50, 1, 2, 40]))) == {"rows": 5.0, "length": 19.2}


def test_protocols_reach_the_ranks_they_name(pool: Pool) -> None:
    group = make_group(pool)
    assert group.rank() == 0
    assert group.visited() == 0


def test_a_future_is_passed_on_without_waiting(pool: Pool) -> None:
    group = make_group(pool)
    batch = rows([3, 50, 1])
    doubled = group.double.start(batch)
    counted = group.count.start(batch)
    again = group.compute.start(doubled.later, rename_doubled)
    assert [len(row) for row in again.result().tokens("response")] == [3, 50, 1]
    assert counted.result()["rows"] == 3.0


def rename_doubled(batch: Batch, context: object) -> Batch:
    return Batch.from_columns({"response": batch.tokens("doubled")})


def test_a_future_made_of_several_is_passed_on_without_waiting(pool: Pool) -> None:
    group = make_group(pool)
    parts = [group.double.start(rows([length])) for length in (3, 5)]
    both = CombinedFuture(parts, Batch.concatenate)
    again = group.compute.start(both.later, rename_doubled)
    assert [len(row) for row in again.result().tokens("response")] == [3, 5]
    assert both.done()


def test_calls_behind_a_waiting_one_keep_their_order(pool: Pool) -> None:
    group = make_group(pool)
    doubled = group.double.start(rows([3]))
    waiting = group.compute.start(doubled.later, rename_doubled)
    last = group.sleep.start(0.0)
    ended = last.result()
    assert waiting.done() and ended <= time.time()


def test_the_first_failure_is_raised_at_once_with_its_traceback(pool: Pool) -> None:
    group = make_group(pool)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"(?s)echo\.fail_on_rank_one failed on rank 1 .*rank one is tired"):
        group.fail_on_rank_one()
    assert time.monotonic() - started < 20  # rank 0 sleeps for 60 s


def test_a_dead_worker_is_named(pool: Pool) -> None:
    with pytest.raises(WorkerDiedError, match=r"echo\.die_on_rank_one failed on rank 1"):
        make_group(pool).die_on_rank_one()


def test_a_dead_worker_is_named_where_its_partner_fails_first(pool: Pool) -> None:
    with pytest.raises(WorkerDiedError, match=r"echo\.lose_partner failed on rank 1"):
        make_group(pool).lose_partner()


def test_the_port_of_a_meeting_place_is_held(pool: Pool) -> None:
    rendezvous_address = ray.get(pool.processes[0].rendezvous_address.remote())
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", int(rendezvous_address.rpartition(":")[2])))


def test_calls_that_wait_when_a_pool_ends_are_dropped(pool: Pool) -> None:
    group = make_group(pool)
    never: ThreadFuture[object] = ThreadFuture()
    pool.queue.submit(never.result, 30.0)  # in front of the call below
    waiting = pool.queue.submit(group.rank)
    pool.end()
    assert waiting.cancelled()
    never.set_result(None)


def test_a_stuck_call_names_the_ranks_that_have_not_answered(pool: Pool) -> None:
    group = make_group(pool, timeout_s=0.5)
    expected = r"echo\.sleep has not ended after run\.timeout_s=0\.5 s on 2 rank\(s\): rank 0 .*is stuck: EchoWorker\.sleep \("
    with pytest.raises(CallTimeoutError, match=expected):
        group.sleep(5.0)


def test_ranks_that_others_wait_for_are_named_long_before_the_limit(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hybridflow")
    monkeypatch.setattr("hybridflow.controller.waiting.SECONDS_OF_SILENCE", 0.4)
    group = make_group(pool, timeout_s=60.0)
    group.sleep_on_rank_one(2.0)
    told = [record.getMessage() for record in caplog.records if "still waiting" in record.getMessage()]
    pattern = r"echo\.sleep_on_rank_one: [01] of 2 ranks are done; after \d s still waiting for rank .*1 \(node.*"
    assert len(told) >= 2 and all(re.match(pattern, message) for message in told), told
    caplog.clear()
    group.sleep(1.0)  # all of them take long
    assert "echo.sleep: 0 of 2 ranks are done; after 0 s still waiting for rank 0 (node" in caplog.records[0].getMessage()


def test_the_controller_moves_the_same_bytes_whatever_the_tokens(pool: Pool) -> None:
    def bytes_for(length: int) -> float:
        group = make_group(pool)
        group.double(rows([length] * 64))
        assert isinstance(group.dispatcher, GroupDispatcher)
        return group.dispatcher.log.drain()["controller/bytes_per_step"]

    assert bytes_for(8192) == pytest.approx(bytes_for(8), rel=0.02)
