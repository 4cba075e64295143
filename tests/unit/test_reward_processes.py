"""What a reward function starts ends with its process, and its answers are its own, whatever it does to itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path

import pytest

from hybridflow.config.schema import RewardConfig, RewardTerm
from hybridflow.errors import RewardError
from hybridflow.guardian import MAX_OUTPUT_BYTES, descendants
from hybridflow.rewards import process_pool
from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Failure, Score

MARK = "# of-this-test-"


@contextmanager
def scoring(folder: Path, body: str, **config: object) -> Iterator[RewardPool]:
    source = (
        f"import os, signal, subprocess, sys, time\nMARK = {MARK + str(folder)!r}\nSLEEP = 'import time; time.sleep(99) '\n"
    )
    path = folder / "reward.py"
    path.write_text(f"{source}def compute_score(reward_input):\n    number = int(reward_input['response'])\n{body}\n")
    pool = RewardPool(RewardConfig(path=str(path), **{"num_processes": 1, "timeout_s": 20.0, **config}))  # type: ignore[arg-type]
    try:
        yield pool
    finally:
        pool.close()


def inputs(count: int) -> list[RewardInput]:
    return [
        RewardInput(response=str(number), ground_truth="", data_source="x", extra_info={}, prompt="") for number in range(count)
    ]


def started(folder: Path) -> list[int]:
    """Processes that the function has started and that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (MARK + str(folder)).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


COPIES = {
    "a fork that returns": "    os.fork()\n    return number",
    "a fork that returns something else": "    return number if os.fork() else -1.0",
    "a fork that returns first": "    if os.fork():\n        time.sleep(0.05)\n    return number",
    "two forks": "    os.fork(); os.fork()\n    return number",
}


@pytest.mark.parametrize("body", COPIES.values(), ids=COPIES)
def test_what_a_copy_of_the_process_says_is_nobodys_answer(body: str, tmp_path: Path) -> None:
    with scoring(tmp_path, body) as pool:
        results = pool.score(inputs(40)) + pool.score(inputs(7))
    assert results == [Score(float(number)) for number in (*range(40), *range(7))]


RAISED = ("KeyboardInterrupt", "GeneratorExit", "BaseException", "SystemExit(3)", "type('Odd', (BaseException,), {})(1, 2)")


@pytest.mark.parametrize("raised", RAISED)
def test_whatever_a_function_raises_fails_that_response_and_the_process_goes_on(raised: str, tmp_path: Path) -> None:
    with scoring(tmp_path, f"    if number == 1: raise {raised}\n    return os.getpid()") as pool:
        first, second, third = pool.score(inputs(3))
    assert isinstance(second, Failure) and second.reason == "raised" and "raise " in second.detail
    assert isinstance(first, Score) and first == third


STARTS = {
    "a subprocess": "subprocess.Popen([sys.executable, '-c', SLEEP + MARK])",
    "a session of its own": "subprocess.Popen([sys.executable, '-c', SLEEP + MARK], start_new_session=True)",
    "one whose parent has gone": (
        "subprocess.run([sys.executable, '-c', f'import subprocess, sys; subprocess.Popen([sys.executable, \"-c\", "
        "{SLEEP + MARK!r}], start_new_session=True)'])"
    ),
    "one that ignores signals": (
        "subprocess.Popen([sys.executable, '-c', 'import signal; [signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15)]; '"
        " + SLEEP + MARK])"
    ),
}
ENDS = {
    "timed out": "time.sleep(99)",
    "died": "os._exit(3)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "closed": "return number",
}


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: sessions are left to themselves elsewhere")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("start", STARTS)
def test_nothing_that_a_function_started_outlives_its_process(start: str, end: str, tmp_path: Path) -> None:
    body = f"    {STARTS[start]}\n    open({str(tmp_path / 'begun')!r}, 'w').close()\n    {ENDS[end]}\n"
    with scoring(tmp_path, body, timeout_s=4.0) as pool:
        (result,) = pool.score(inputs(1))
        assert isinstance(result, Score if end == "closed" else Failure)
        assert (tmp_path / "begun").exists(), "the test itself"
        assert end == "closed" or started(tmp_path) == []
    assert started(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="NOT RUN: needs prctl")
def test_nothing_outlives_a_killed_parent_of_the_pool(tmp_path: Path) -> None:
    body = f"    {STARTS['a session of its own']}\n    import re; re.match('(a+)+$', 'a' * 60 + 'b')"  # keeps the GIL
    (tmp_path / "x").mkdir()
    code = (
        f"import sys; sys.path.insert(0, {os.getcwd()!r}); from pathlib import Path\n"
        "from tests.unit import test_reward_processes as t\n"
        f"with t.scoring(Path({str(tmp_path)!r}), {body!r}) as pool: pool.score(t.inputs(1))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 60
        while not started(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        family = descendants(parent.pid)
        assert started(tmp_path) and len(family) >= 3
        parent.kill()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{number}").exists() for number in family) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [number for number in family if Path(f"/proc/{number}").exists()] and not started(tmp_path)


def test_what_a_function_prints_is_bounded_and_does_not_hold_it_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = "    print(f'response {number}')\n    for _ in range(1280): sys.stdout.write('y' * 9999 + '\\n')\n    return number"
    with scoring(tmp_path, body) as pool:
        assert pool.score(inputs(3)) == [Score(0.0), Score(1.0), Score(2.0)]
    said = capfd.readouterr().err
    assert said.startswith("response 0\n") and said.count("the rest is dropped") == 1
    assert len(said) < MAX_OUTPUT_BYTES + 200


def test_a_process_that_was_stopped_holds_nobody_up(tmp_path: Path) -> None:
    with scoring(tmp_path, "    return len(reward_input['prompt'])", timeout_s=2.0) as pool:
        assert pool.score(inputs(1)) == [Score(0.0)]
        (worker,) = descendants(pool._children[0].process.pid)
        os.kill(worker, signal.SIGSTOP)
        started_at = time.monotonic()
        long = [RewardInput(response="0", ground_truth="", data_source="x", extra_info={}, prompt="p" * 2**20)] * 8
        results = pool.score(long)
        assert time.monotonic() - started_at < 30
        assert all(result == Score(2.0**20) or isinstance(result, Failure) for result in results)
        assert sum(result == Score(2.0**20) for result in results) >= 6


@pytest.mark.parametrize("parent", ["has heard nothing", "has heard the beginning"])
def test_a_process_whose_parent_has_gone_says_nothing(parent: str, tmp_path: Path) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def compute_score(reward_input):\n    return 1.0\n")
    ours, theirs = Pipe()
    code = "from hybridflow.rewards.child import main; main()"
    command = [sys.executable, "-c", code, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as process:
        theirs.close()
        ours.send(RewardConfig(path=str(path)))
        if parent == "has heard the beginning":
            ours.recv()
        ours.send((1, inputs(200)))
        ours.poll(60)
        ours.close()  # with answers in it that nobody has read
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0


def test_a_file_that_hangs_when_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_pool, "LOAD_TIMEOUT_S", 2.0)
    path = tmp_path / "waits.py"
    path.write_text("import time\ntime.sleep(3600)\ndef compute_score(reward_input):\n    return 1.0\n")
    with pytest.raises(RewardError, match=r"waits\.py was not loaded within 2 s: see what it waits for"):
        RewardPool(RewardConfig(path=str(path), num_processes=1)).score(inputs(1))
    several = RewardConfig(functions=(RewardTerm(path=str(path)), RewardTerm(name="gsm8k")), num_processes=1)
    with pytest.raises(RewardError, match=r"waits\.py, gsm8k was not loaded"):
        RewardPool(several).score(inputs(1))
