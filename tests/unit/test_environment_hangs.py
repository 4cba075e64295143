"""An environment, a tool or an agent that hangs, wherever: bounded, its own episode's affair, and told by its method."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest

from hybridflow.config.schema import EnvironmentConfig
from hybridflow.environments import processes
from hybridflow.errors import EpisodeError
from hybridflow.workers.rollout import RolloutWorker
from tests.unit.episodes import episode_config, episode_rows, worker_of

LIMIT_S = 1.0
HANGS = {
    "sleeps": "time.sleep(3600)",
    "spins": "while True: pass",
    "spins in C": "re.match('(a+)+$', 'a' * 60 + 'b')",
    "waits for a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "waits for a child": "subprocess.run(['sleep', '3600'])",
    "reads from nobody": "socket.create_server(('127.0.0.1', 0)).accept()",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}
EVERY = list(itertools.product(["def", "async def"], ["reset", "step", "close"], HANGS))
SOME = [
    ("def", "reset", "is stopped"),
    ("def", "step", "spins in C"),
    ("def", "close", "sleeps"),
    ("async def", "step", "spins"),
]
IS_LONG = "HYBRIDFLOW_LONG_TESTS" in os.environ
"""All combinations, which takes some minutes."""
IMPORTS = "import asyncio, os, re, signal, socket, subprocess, threading, time\n"
ENVIRONMENT = (
    IMPORTS
    + """
def hang():
    {hang}

class Odd:
    def __init__(self):
        self.where = "nowhere"

    {reset_kind} reset(self, row):
        self.where = row["ground_truth"]
        if self.where == "reset": hang()
        return row["messages"], {{}}

    {step_kind} step(self, message):
        if self.where == "step": hang()
        return [], 1.0, True, False, {{}}

    def close(self):
        if self.where == "close": hang()
"""
)
TOOLS = (
    IMPORTS
    + """
from transformers.utils.chat_template_utils import get_json_schema
from hybridflow.environments.tools import ToolEnvironment

{kind} look(name: str) -> str:
    '''Looks.

    Args:
        name: what for.
    '''
    {hang}

get_json_schema(look)  # imports what the first reset would wait for

class Tools(ToolEnvironment):
    tools = (look,)

    async def step(self, message):
        if self.row["ground_truth"] == "hangs":
            call = {{"type": "function", "id": "call00000", "function": {{"name": "look", "arguments": {{"name": "x"}}}}}}
            message = {{**message, "tool_calls": [call]}}
        return await super().step(message)

    def score(self, message):
        return 1.0
"""
)
Start = Callable[..., RolloutWorker]


@pytest.fixture
def start(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr(processes, "SILENCE_S", 2.0)
    begun: list[RolloutWorker] = []

    def start(source: str, **environment: object) -> RolloutWorker:
        (tmp_path / "environment.py").write_text(source)
        config = episode_config(tiny_model, tmp_path / "environment.py", **{"timeout_s": LIMIT_S, **environment})
        begun.append(worker_of(config))
        return begun[-1]

    yield start
    started = time.monotonic()
    for worker in begun:
        worker.close()
    assert time.monotonic() - started < 15, "what hangs does not hold up the end"


@pytest.mark.parametrize(("kind", "where", "hang"), EVERY if IS_LONG else SOME)
def test_a_method_that_hangs_is_bounded_and_other_episodes_are_played(
    start: Start, hang: str, where: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(ENVIRONMENT.format(hang=HANGS[hang], reset_kind=kind, step_kind=kind), num_processes=2)
    began = time.monotonic()
    answered = worker.generate(episode_rows([where, "nowhere", "nowhere"]))
    assert time.monotonic() - began < 20
    failed = answered["episode_failed"].tolist()
    assert failed[0] == (where != "close"), "what it says after its end is nobody's affair"
    if where != "close":
        told = "\n".join(caplog.messages)
        assert f"{where} has not returned within environment.timeout_s=1" in told or "its process said nothing" in told
    if where == "close":  # of a process that it has brought down nobody knows before it was silent for a while
        worker.generate(episode_rows(["nowhere"] * 4))
    assert not worker.generate(episode_rows(["nowhere"] * 4))["episode_failed"].any()


@pytest.mark.parametrize(("kind", "hang"), itertools.product(["def", "async def"], HANGS) if IS_LONG else [("def", "sleeps")])
def test_a_tool_that_hangs_is_bounded(start: Start, hang: str, kind: str) -> None:
    worker = start(TOOLS.format(hang=HANGS[hang], kind=kind), timeout_s=2.0)
    began = time.monotonic()
    answered = worker.generate(episode_rows(["hangs", "fine"]))
    assert time.monotonic() - began < 20
    assert answered["episode_failed"][0]
    assert not worker.generate(episode_rows(["fine"] * 2))["episode_failed"].any()


@pytest.mark.parametrize("hang", ["sleeps", "is stopped"])
def test_where_all_episodes_hang_the_run_ends_with_the_method_that_does(start: Start, hang: str) -> None:
    worker = start(ENVIRONMENT.format(hang=HANGS[hang], reset_kind="def", step_kind="async def"))
    began = time.monotonic()
    with pytest.raises(EpisodeError, match=r"(step has not returned within environment\.timeout_s=1|said nothing for 3 s)"):
        for _ in range(4):
            worker.generate(episode_rows(["step"] * 16))
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("place", ["when it is imported", "when it is built"])
def test_a_class_that_hangs_when_it_is_loaded_ends_the_start(start: Start, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOAD_TIMEOUT_S", 4.0)
    body = "time.sleep(3600)"
    source = ENVIRONMENT.format(hang="pass", reset_kind="def", step_kind="def")
    source = source + f"\n{body}\n" if "imported" in place else source.replace('self.where = "nowhere"', body)
    began = time.monotonic()
    if "imported" in place:
        with pytest.raises(EpisodeError, match="was not loaded within 4 s"):
            start(source)
    else:
        assert start(source).generate(episode_rows(["nowhere"] * 2))["episode_failed"].all()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("is_configured", [False, True])
def test_a_process_whose_parent_has_gone_before_the_class_is_loaded_ends_without_a_trace(
    tmp_path: Path, is_configured: bool
) -> None:
    path = tmp_path / "environment.py"
    path.write_text("import time\ntime.sleep(2)\nclass Own:\n    def reset(self, row): ...\n    def step(self, message): ...\n")
    ours, theirs = Pipe()
    code = "from hybridflow.environments.child import main; main()"
    command = [sys.executable, "-c", code, str(theirs.fileno())]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True) as process:
        theirs.close()
        if is_configured:
            ours.send(EnvironmentConfig(path=str(path)))
        ours.close()
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
