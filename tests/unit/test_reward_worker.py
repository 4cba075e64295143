"""Scoring in processes: no response is lost, and none holds up the others."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch
from hybridflow.config.schema import Config, RewardConfig
from hybridflow.controller.failed_rewards import FailedRewards
from hybridflow.errors import RewardError
from hybridflow.parallel.layout import Layout
from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Failure, Score
from hybridflow.workers.base import RankContext
from hybridflow.workers.reward import RewardWorker

MISBEHAVING = """
import os, re, sys, time
REWARD_NAME = "misbehaving"
def compute_score(reward_input):
    response = reward_input["response"]
    if response == "loop":
        while True: pass
    if response == "sleep": time.sleep(1000)
    if response == "stuck in C": re.match("(a+)+$", "a" * 60 + "b")
    if response == "end": os._exit(3)
    if response == "killed": os.kill(os.getpid(), 9)
    if response == "exit": sys.exit(1)
    if response == "raise": raise ValueError("this response is bad")
    if response == "none": return None
    if response == "pid": return {"overall": 1, "pid": os.getpid()}
    if response == "torch": return float("torch" in sys.modules or "ray" in sys.modules)
    return {"overall": 1.0, "length": len(response)}
"""


MORE = {"messages": [], "conversation": [], "response_tokens": 1, "truncated": False}


def inputs(*responses: str) -> list[RewardInput]:
    return [
        RewardInput(response=text, ground_truth="72", data_source="openai/gsm8k", extra_info={}, prompt="q", **MORE)
        for text in responses
    ]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RewardPool]:
    path = tmp_path_factory.mktemp("rewards") / "misbehaving.py"
    path.write_text(MISBEHAVING)
    pool = RewardPool(RewardConfig(path=str(path), timeout_s=0.5))
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("loop", "timed out"),
        ("sleep", "timed out"),
        ("stuck in C", "timed out"),
        ("end", "died"),
        ("killed", "died"),
        ("exit", "raised"),
        ("raise", "raised"),
        ("none", "raised"),
    ],
)
def test_a_bad_response_fails_alone(pool: RewardPool, response: str, reason: str) -> None:
    results = pool.score(inputs("a", response, *["b"] * 10))
    failures = [result for result in results if isinstance(result, Failure)]
    assert [failure.reason for failure in failures] == [reason]
    assert isinstance(results[1], Failure)


def test_the_first_response_that_takes_too_long_is_told_while_others_are_scored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "waits.py").write_text(MISBEHAVING)
    pool = RewardPool(RewardConfig(path=str(tmp_path / "waits.py"), timeout_s=0.5))
    with caplog.at_level("WARNING", logger="hybridflow"):
        pool.score(inputs("a", "sleep", "sleep"))
    pool.close()
    (told,) = [record.getMessage() for record in caplog.records if "holds up the step" in record.getMessage()]
    assert "no result within reward.timeout_s=0.5" in told


def test_the_time_limit_is_for_each_response(pool: RewardPool) -> None:
    pool.score(inputs("warm"))
    start = time.perf_counter()
    pool.score(inputs(*["a"] * 60, "sleep"))
    # One limit of 0.5 s, and not one for each of the sixty.
    assert time.perf_counter() - start < 5.0


def test_a_raised_error_comes_with_its_traceback(pool: RewardPool) -> None:
    (failure,) = pool.score(inputs("raise"))
    assert isinstance(failure, Failure)
    assert "misbehaving.py" in failure.detail
    assert "this response is bad" in failure.detail


def test_results_come_in_the_order_of_the_inputs(pool: RewardPool) -> None:
    results = pool.score(inputs(*["x" * length for length in range(200)]))
    assert [result.metrics["length"] for result in results if isinstance(result, Score)] == list(range(200))


def test_nothing_to_score_is_scored_at_once(pool: RewardPool) -> None:
    assert pool.score([]) == []


def test_a_child_that_was_killed_while_idle_is_replaced(pool: RewardPool) -> None:
    (result,) = pool.score(inputs("pid"))
    assert isinstance(result, Score)
    os.kill(int(result.metrics["pid"]), signal.SIGKILL)
    time.sleep(0.1)
    assert all(isinstance(result, Score) for result in pool.score(inputs(*["a"] * 40)))


ENDS_AFTER_ITS_ANSWER = """
import os
from multiprocessing.connection import Connection
from hybridflow.rewards.results import Score
send = Connection.send

def send_and_end(connection, value):
    send(connection, value)
    if isinstance(value, Score): os._exit(3)

Connection.send = send_and_end

def compute_score(reward_input): return 1.0
"""


def test_a_child_that_ends_after_its_last_answer_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS_AFTER_ITS_ANSWER)
    pool = RewardPool(RewardConfig(path=str(tmp_path / "ends.py"), num_processes=1))
    for _ in range(3):
        (result,) = pool.score(inputs("a"))
        assert result == Score(1.0) or (isinstance(result, Failure) and result.reason == "died")
    pool.close()


def test_children_import_neither_torch_nor_ray(pool: RewardPool) -> None:
    (result,) = pool.score(inputs("torch"))
    assert isinstance(result, Score)
    assert result.reward == 0.0


def test_a_thousand_cheap_responses_take_well_under_a_second() -> None:
    pool = RewardPool(RewardConfig(name="gsm8k", num_processes=2))
    rows = inputs(*["#### 72"] * 1024)
    pool.score(rows)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        results = pool.score(rows)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # about 0.04 s on an idle machine; beside other work some attempt has the cores for so long
    assert all(isinstance(result, Score) and result.reward == 1.0 for result in results)
    pool.close()


STUCK = """
import os, pathlib
def compute_score(reward_input):
    pathlib.Path(reward_input["response"]).write_text(str(os.getpid()))
    while True: pass
"""
SCORE_STUCK = """
import sys
from hybridflow.config.schema import RewardConfig
from hybridflow.rewards.process_pool import RewardPool
pool = RewardPool(RewardConfig(path=sys.argv[1], timeout_s=100, num_processes=1))
pool.score([{"response": sys.argv[2], "ground_truth": "", "data_source": "", "extra_info": {}, "prompt": ""}])
"""


def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    pid_file = tmp_path / "pid"
    command = [sys.executable, "-c", SCORE_STUCK, str(tmp_path / "stuck.py"), str(pid_file)]
    parent = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    wait_until(lambda: pid_file.exists() and pid_file.read_text() != "")
    child = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(child))


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ValueError('at import')", "does not import: ValueError: at import"),
        ("def other(x): ...", "no function 'compute_score'"),
        ("import os\nos._exit(5)", "ended with exit code 5 while it loaded"),
    ],
)
def test_a_function_that_does_not_load_is_reported_at_construction(tmp_path: Path, source: str, problem: str) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(RewardError, match=problem):
        RewardPool(RewardConfig(path=str(tmp_path / "bad.py")))


def worker(**reward: object) -> RewardWorker:
    context = RankContext(role="reward", rank=0, layout=Layout(), device=torch.device("cpu"))
    return RewardWorker(Config(reward=RewardConfig(num_processes=1, **reward)), context)


def batch(*responses: str, data_source: str = "openai/gsm8k") -> Batch:
    count = len(responses)
    return Batch.from_columns(
        {
            "response_text": list(responses),
            "ground_truth": ["72"] * count,
            "data_source": [data_source] * count,
            "extra_info": [{"index": index} for index in range(count)],
            "prompt_text": ["how many?"] * count,
        }
    )


def test_the_worker_writes_rewards_failures_and_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text(MISBEHAVING)
    scorer = worker(path=str(tmp_path / "mine.py"), failure_reward=-1.0)
    with caplog.at_level(logging.WARNING):
        scored = scorer.score(batch("abc", "raise", "raise", "pid"))
    scorer.close()
    assert scored["reward"].tolist() == [1.0, -1.0, -1.0, 1.0]
    assert scored["reward_failed"].tolist() == [False, True, True, False]
    np.testing.assert_array_equal(scored["reward/length"], np.array([3, np.nan, np.nan, np.nan], np.float32))
    assert {str(scored[name].dtype) for name in scored.per_row} == {"float32", "bool"}
    (record,) = caplog.records
    assert "reward 'misbehaving': 2 of 4 responses failed (2 raised)" in record.getMessage()
    assert record.getMessage().count("this response is bad") == 2  # the line of code and the error, of one traceback


def test_the_first_failure_of_a_step_is_logged_and_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "mine.py").write_text(MISBEHAVING)
    scorer = worker(path=str(tmp_path / "mine.py"))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            scorer.begin_step(step, 2)
            scorer.score(batch("raise"))
            scorer.score(batch("none"))
    scorer.close()
    assert ["this response is bad" in record.getMessage() for record in caplog.records] == [True, True]


def test_a_pool_whose_processes_have_ended_says_so() -> None:
    pool = RewardPool(RewardConfig(name="gsm8k", num_processes=1))
    pool.close()
    with pytest.raises(RewardError, match="the scoring processes have ended"):
        pool.score(inputs("#### 72"))


def test_a_batch_function_that_raises_fails_all_its_rows(tmp_path: Path) -> None:
    source = "REWARD_TYPE = 'batch'\ndef compute_score(inputs):\n    return [1 / len(i['response']) for i in inputs]"
    (tmp_path / "mine.py").write_text(source)
    scorer = worker(path=str(tmp_path / "mine.py"), failure_reward=0.5)
    assert scorer.score(batch("a", "ab"))["reward"].tolist() == [1.0, 0.5]
    assert scorer.score(batch("a", ""))["reward_failed"].tolist() == [True, True]
    scorer.close()


def test_a_batch_function_that_hangs_fails_all_its_rows(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("REWARD_TYPE = 'batch'\ndef compute_score(inputs):\n    while True: pass")
    scorer = worker(path=str(tmp_path / "mine.py"), timeout_s=0.1)
    assert scorer.score(batch("a", "b"))["reward_failed"].tolist() == [True, True]
    scorer.close()


def test_an_unknown_data_source_stops_the_step() -> None:
    scorer = worker()
    with pytest.raises(RewardError, match="no reward rule belongs to data_source 'mine'"):
        scorer.score(batch("a", data_source="mine"))


def test_ranks_whose_functions_return_other_metrics_concatenate() -> None:
    first = Batch({"reward": np.ones(1, np.float32), "reward/a": np.ones(1, np.float32)})
    second = Batch({"reward": np.zeros(2, np.float32)})
    np.testing.assert_array_equal(Batch.concatenate([first, second])["reward/a"], np.array([1, np.nan, np.nan], np.float32))


ASYNC = """
import asyncio, time
async def compute_score(reward_input):
    text = reward_input["response"]
    if text == "block": time.sleep(1000)
    if text == "late": await asyncio.sleep(1000)
    if text == "raise": raise ValueError("bad")
    if text == "own": raise TimeoutError("of the judge")
    await asyncio.sleep(0.2)
    return len(text)
"""


def test_coroutines_run_at_the_same_time_and_fail_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ASYNC)
    pool = RewardPool(RewardConfig(path=str(tmp_path / "mine.py"), num_processes=1, timeout_s=1.5, concurrency=64))
    pool.score(inputs("warm"))
    started = time.perf_counter()
    results = pool.score(inputs(*["a" * length for length in range(60)], "late", "raise", "own"))
    # One after the other 60 calls of 0.2 s take 12 s.
    assert time.perf_counter() - started < 4.0
    assert [result.reward for result in results[:60] if isinstance(result, Score)] == list(range(60))
    assert [result.reason for result in results[60:] if isinstance(result, Failure)] == ["timed out", "raised", "raised"]
    pool.close()


def test_a_coroutine_that_blocks_its_process_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ASYNC)
    pool = RewardPool(RewardConfig(path=str(tmp_path / "mine.py"), num_processes=2, timeout_s=0.5))
    results = pool.score(inputs("a", "block", *["b"] * 6))
    assert [isinstance(result, Score) for result in results] == [True, False, *[True] * 6]
    pool.close()


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("def compute_score(x):\n    raise KeyError('answer')", "raised: KeyError: 'answer'"),
        ("def compute_score(x):\n    return 1e39", "must be finite, and at most 3.4e38"),
        ("def compute_score(x):\n    return None", "the function returned None"),
        ("import os\ndef compute_score(x):\n    os._exit(4)", "died: the scoring process ended with exit code 4"),
        ("import time\ndef compute_score(x):\n    time.sleep(9)", "timed out: no result within reward.timeout_s=0.2"),
        ("async def compute_score(x):\n    return [1]", "the function returned a list"),
        ("REWARD_TYPE = 'batch'\ndef compute_score(xs):\n    return [None] * len(xs)", "the function returned None"),
    ],
)
def test_a_step_whose_rewards_fail_ends_with_their_cause(tmp_path: Path, source: str, cause: str) -> None:
    (tmp_path / "mine.py").write_text(source)
    scorer = worker(path=str(tmp_path / "mine.py"), timeout_s=0.2)

    def collect(prompts: Batch) -> Batch:
        return scorer.score(batch(*["a"] * len(prompts)))

    guard = FailedRewards(prompts_per_step=4, max_share=0.5, cause=scorer.failure_cause).watching(collect)
    two_prompts = Batch({"prompt_id": np.arange(2)})
    guard(two_prompts)  # half a step says nothing yet
    with pytest.raises(RewardError, match=r"4 of 4 responses of a step.*max_failed_share=0.5") as raised:
        guard(two_prompts)
    assert cause in str(raised.value)
    scorer.close()


def test_a_share_of_failures_that_is_allowed_ends_nothing() -> None:
    rows = Batch({"reward_failed": np.array([True, True, False, False])})
    for max_share, is_allowed in ((0.5, True), (0.49, False), (1.0, True)):
        guard = FailedRewards(prompts_per_step=2, max_share=max_share, cause=lambda: "why")
        with nullcontext() if is_allowed else pytest.raises(RewardError):
            guard.count(2, rows)
