"""A start that gets nowhere ends, and says where it is stuck."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.processes import training, wait_until
from tests.ray.runs import Toy

HANGS = """
import time
with open("/proc/self/cmdline", "rb") as file:
    if b"default_worker.py" in file.read():
        time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_in_which_python_hangs_while_it_starts_are_named_with_where(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    command = [str(toy.config), f"run.folder={tmp_path / 'run'}", "run.timeout_s=10"]
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    with training(command, tmp_path / "log", environment=environment) as run:
        assert run.wait() == 1, run.log.read_text()
        text = run.log.read_text()
        assert "has not ended after run.timeout_s=10 s" in text and "Their processes have not come up." in text
        assert "sitecustomize.py:5)" in text
        wait_until(lambda: not run.working(), lambda: "\n".join(run.working()))
