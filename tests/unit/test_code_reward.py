"""Programs of a policy in their sandbox: what each of them may not do, and that a step goes on meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path

import pytest

from hybridflow.config.schema import RewardConfig
from hybridflow.rewards.code import compute_score, program_of
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Score
from hybridflow.rewards.sandbox import Limits, ProgramRun, run_program
from tests.unit.test_reward_worker import inputs
from tests.unit.test_rewards import given

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are held by means of Linux")

OUTSIDE = "/tmp/rewards_written_from_a_sandbox"
LIMITS = Limits(cpu_s=1, wall_s=2)
"""Of programs that run into them."""
AMPLE = Limits(cpu_s=30, wall_s=60)
"""Of programs that end by themselves, on a machine that does much else."""
MARK = "of_a_sandbox_test"
"""In the arguments of processes that programs start, to find them by."""

ADVERSE = {
    "endless loop": "while True: pass",
    "endless sleep": "import time\ntime.sleep(1000)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "threads without end": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(1000,)).start()",
    "threads of little memory": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=(1000,)).start()"
    ),
    "memory in files without a name": "import os\nwhile True: os.write(os.memfd_create('a'), b'x' * (30 << 20))",
    "memory that is shared": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
    "messages that are shared": "import ctypes\nassert ctypes.CDLL(None).msgget(0, 0o1600) >= 0",
    "semaphores that are shared": "import ctypes\nassert ctypes.CDLL(None).semget(0, 1000, 0o1600) >= 0",
    "memory in a socket's buffer": (
        "import socket\nwriter, reader = socket.socketpair()\nwriter.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 26)"
    ),
    "empty files without end": "n = 0\nwhile True:\n    open(str(n), 'w').close()\n    n += 1",
    "a user namespace": "import ctypes\nassert ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
    "a user namespace by clone3": (
        "import ctypes, struct\nasked = struct.pack('11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)\n"
        "assert ctypes.CDLL(None).syscall(435, asked, 88) >= 0"
    ),
    "10 GB": "b = bytearray(10 << 30)\nb[::4096] = b'x' * len(b[::4096])",
    "10 GB in parts": "parts = []\nwhile True: parts.append(bytearray(b'x' * (1 << 24)))",
    "1 GB by each child": "import os\nfor _ in range(8): os.fork()\nb = b'x' * (900 << 20)\nimport time\ntime.sleep(9)",
    "a write outside its folder": f"open({OUTSIDE!r}, 'w').write('x')",
    "a write outside by a link": f"import os\nos.symlink({OUTSIDE!r}, 'link')\nopen('link', 'w').write('x')",
    "a write outside by another program": f"import subprocess\nsubprocess.run(['touch', {OUTSIDE!r}], check=True)",
    "a read of what is not its own": "open('/proc/1/environ').read()",
    "a file without end": "f = open('a', 'wb')\nwhile True: f.write(b'x' * 1000000)",
    "files without end": "n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 1000000)\n    n += 1",
    "a network call": "import socket\nsocket.create_connection(('127.0.0.1', 22), 1)",
    "a datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))",
    "a local socket": "import socket\nsocket.socket(socket.AF_UNIX)",
    "output without end": "while True: print('x' * 10000)",
    "an exit before the tests": "import os\nos._exit(0)",
    "an error": "1 / 0",
    "killing all": "import os\nos.kill(-1, 9)\nos.kill(1, 9)\nraise SystemExit(1)",
}
OUTLIVES = f"""
import os, subprocess, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', '{MARK}'])
    os._exit(0)
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)', '{MARK}'], start_new_session=True)
"""


def run(program: str, text: str = "", limits: Limits = LIMITS) -> ProgramRun:
    return asyncio.run(run_program(program, [text], limits=limits))[0]


def marked_processes() -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            if MARK.encode() in command and b"pytest" not in command:
                found.append(command.decode())
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", ADVERSE)
def test_what_a_program_may_not_do_ends_within_its_limits(name: str) -> None:
    started = time.perf_counter()
    ended = run(ADVERSE[name] + "\nprint('went on')")
    assert "went on" not in ended.stdout
    assert ended.exit_code != 0 or name == "an exit before the tests"
    assert time.perf_counter() - started < 60  # most of them would take for ever
    assert not os.path.exists(OUTSIDE)


def test_children_do_not_outlive_the_program() -> None:
    assert run(OUTLIVES, limits=AMPLE).exit_code == 0
    assert marked_processes() == []


def test_children_do_not_outlive_a_call_that_is_given_up() -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(run_program(OUTLIVES + "\nimport time\ntime.sleep(1000)", limits=Limits(wall_s=60)), 1.0)

    asyncio.run(give_up())
    deadline = time.monotonic() + 30
    while marked_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked_processes() == []


def test_programs_may_compute_write_in_their_folder_and_import_packages() -> None:
    program = "import numpy as np, threading\nthreading.Thread(target=int).start()\nopen('a', 'w').write(str(np.ones(3).sum()))"
    program += "\nprint(open('a').read(), input())"
    assert run(program, "said", AMPLE).stdout == "3.0 said\n"
    assert run("import os\nprint(sorted(os.environ), os.listdir())", limits=AMPLE).stdout.count("program.py") == 1


def test_programs_may_start_processes_and_event_loops() -> None:
    program = """
import asyncio, multiprocessing, subprocess, sys

async def said():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(1)", stdout=subprocess.PIPE)
    return (await process.communicate())[0].decode().strip()

ours, theirs = multiprocessing.Pipe()
child = multiprocessing.get_context("fork").Process(target=theirs.send, args=("2",))
child.start()
print(asyncio.run(said()), ours.recv(), subprocess.run([sys.executable, "-c", "print(3)"], capture_output=True).stdout)
child.join()
"""
    ended = run(program, limits=AMPLE)
    assert ended.stdout == "1 2 b'3\\n'\n", ended.stderr


def scored(response: str, truth: object, **options: object) -> dict[str, float]:
    limits = {"cpu_s": AMPLE.cpu_s, "wall_s": AMPLE.wall_s}
    return dict(asyncio.run(compute_score(given(f"```python\n{response}\n```", truth), **limits, **options)))


ADD = "def add(a, b):\n    return a + b"
SOLUTION = "class Solution:\n    def add(self, a, b):\n        return a + b"
ECHO = "a, b = map(int, input().split())\nprint(a + b)"


@pytest.mark.parametrize(
    ("program", "truth"),
    [
        (ADD, "assert add(1, 2) == 3"),
        (ADD, ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]),
        (ADD, json.dumps(["assert add(1, 2) == 3"])),
        (ECHO, {"inputs": ["1 2\n", "3 4"], "outputs": ["3", "7\n"]}),
        (ECHO, json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}),
        (SOLUTION, {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}),
    ],
)
def test_every_form_of_tests_is_passed_by_the_right_program_and_not_by_a_wrong_one(program: str, truth: object) -> None:
    assert scored(program, truth)["overall"] == 1.0
    assert scored(program.replace("+", "-"), truth) == {"overall": 0, "accuracy": 0, "format": 1, "tests_passed": 0}


@pytest.mark.parametrize("leaves", ["raise SystemExit", "import os; os._exit(0)", "print('passed'); exit()"])
def test_a_program_that_leaves_before_its_tests_fails(leaves: str) -> None:
    for truth in ("assert False", {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}):
        assert scored(f"{ADD}\n{leaves}", truth)["overall"] == 0.0


def test_a_program_cannot_take_its_test_into_a_line_of_its_own() -> None:
    answer = given("```python\ndef add(a, b): return 0\nif False: pass; \\```", "assert add(1, 2) == 3")
    assert asyncio.run(compute_score(answer))["overall"] == 0


def test_a_share_of_the_tests_may_count() -> None:
    truths = [f"assert add(1, {n}) == 3" for n in range(4)]
    assert scored(ADD, truths, partial=True) == {"overall": 0.25, "accuracy": 0, "format": 1, "tests_passed": 0.25}
    inputs_and_outputs = {"inputs": ["1 2", "1 3"], "outputs": ["3", "5"]}
    assert scored(ECHO, inputs_and_outputs, partial=True)["overall"] == 0.5


def test_a_response_without_a_program_gets_nothing() -> None:
    assert program_of("none") is None
    found = asyncio.run(compute_score(given("def add(a, b): return a + b", "assert True")))
    assert found["overall"] == found["format"] == 0.0


@pytest.mark.slow
def test_sixty_four_at_once_are_stopped_and_the_step_goes_on() -> None:
    programs = [*ADVERSE.values(), OUTLIVES] * 3 + [ADD]
    rows = inputs(*[f"```python\n{program}\n```" for program in programs[-64:]])
    for row in rows:
        row["ground_truth"] = "assert add(1, 2) == 3"
    options = {"cpu_s": 2, "wall_s": 20}
    pool = RewardPool(RewardConfig(name="code", num_processes=1, concurrency=64, timeout_s=180, options=options))
    started = time.perf_counter()
    results = pool.score(rows)
    seconds = time.perf_counter() - started
    pool.close()
    assert [result.reward for result in results if isinstance(result, Score)] == [0.0] * 63 + [1.0]
    assert seconds < 150
    assert marked_processes() == []
    assert not os.path.exists(OUTSIDE)
