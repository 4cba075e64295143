"""Ray workers that are forked from a process which has imported what ranks need. Each is a process of its own as ever, with its
own environment; but imports take most of a short run's time, and are made once here.

Ray starts its workers with the interpreter that it finds in `sys.executable`. While a cluster begins that is a small script,
which hands a worker's arguments, environment and output to the process that forks it, and ends when the worker does. The folder
of that script on PYTHONPATH does the same for a cluster that a command begins.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

IMPORTED = (
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "hybridflow.models.build",
    "hybridflow.rollout.torch_engine",
    "hybridflow.workers.actor",
    "hybridflow.workers.critic",
    "hybridflow.workers.data",
    "hybridflow.workers.model_spec",
    "hybridflow.workers.reference",
    "hybridflow.workers.reward",
    "hybridflow.workers.rollout",
    "hybridflow.workers.sync",
    "hybridflow.workers.training",
)
"""All but Ray, which reads the number of its job from the environment when it is imported."""
MARK = "HYBRIDFLOW_TEST_RUN"
"""In the environment, and with it in that of every process that a run starts."""
HEADER = 8
"""Bytes of the length of what is asked for."""
SCRIPT = """#!{python} -SE
import json, os, socket, sys
if not any(argument.endswith("default_worker.py") for argument in sys.argv[1:2]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
with socket.socket(socket.AF_UNIX) as line:
    line.connect({address!r})
    socket.send_fds(line, [len(asked).to_bytes({header}, "big")], [1, 2])
    line.sendall(asked)
    line.recv(1)
"""


@contextmanager
def forked_workers(folder: Path) -> Iterator[Path]:
    """What stands for the interpreter in `sys.executable` while a cluster begins; for as long as its workers are needed."""
    address, script = str(folder / "socket"), folder / "python"
    script.write_text(SCRIPT.format(python=sys.executable, address=address, header=HEADER))
    script.chmod(0o755)
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(script)!r}\n")
    process = subprocess.Popen([sys.executable, "-m", __name__, address], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n", "the imports failed: see above"
        yield script
    finally:
        process.terminate()
        process.wait()


def serve(address: str) -> None:
    """Fork a worker for each connection, until the process that started this one ends."""
    for module in IMPORTED:
        importlib.import_module(module)
    assert "ray" not in sys.modules
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended workers are not waited for
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen(64)
        listening.settimeout(1.0)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while os.getppid() == parent:
            with suppress(TimeoutError):
                line = listening.accept()[0]
                if os.fork() == 0:
                    listening.close()
                    become_worker(line, Path(address).parent)
                line.close()


def become_worker(line: socket.socket, folder_of_marks: Path) -> None:
    """Do what the interpreter would have done with these arguments, in this environment."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray may end a worker with its group, which is that of the tests otherwise
    line.settimeout(None)
    header, descriptors, _, _ = socket.recv_fds(line, HEADER, 2)
    with line.makefile("rb") as stream:
        arguments, environment, folder = json.loads(stream.read(int.from_bytes(header, "big")))
    for number, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if MARK in environment:  # which does not show in /proc of a forked process
        (folder_of_marks / f"{environment[MARK]}.{os.getpid()}").touch()
    os.chdir(folder)
    random.seed()  # from the system, not as all others
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)
    code = 1
    try:
        runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)  # what the forking process would do in its end is not this one's


if __name__ == "__main__":
    serve(sys.argv[1])
