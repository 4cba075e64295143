"""What a run says while it starts, and how that looks in a file."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

import pytest

from hybridflow.config.schema import Config
from hybridflow.controller import launch
from hybridflow.controller.rank_process import prepare_console
from tests.ray.processes import training
from tests.ray.runs import Toy

FIRST_RANK = re.compile(r"^\(main rank 0 pid=\d+\) \d\d:\d\d:\d\d rollout rank 0: starting engine torch$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_redirected_run_is_plain_text_in_which_the_first_ranks_say_what_they_do(
    toy: Toy, forking: Path, tmp_path: Path
) -> None:
    settings = [f"run.folder={tmp_path / 'run'}", "placement.pools.main=1x2", "trackers.names=[console]"]
    with training([str(toy.config), *settings], tmp_path / "log", forking=forking) as run:
        assert run.wait() == 0, (tmp_path / "log").read_text()
    text = (tmp_path / "log").read_text()
    assert FIRST_RANK.search(text), text
    assert "rollout rank 1" not in text, "what all ranks do is said once"
    assert "\x1b" not in text
    assert "step 2/2  reward" in text


def test_what_torchs_compiler_decides_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    log = logging.getLogger("hybridflow")
    for name in ("handlers", "propagate", "level"):
        monkeypatch.setattr(log, name, getattr(log, name))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        prepare_console(logging.INFO)
        warnings.warn("\nOnline softmax is disabled on the fly since Inductor decides to\nsplit the reduction.", stacklevel=1)
        warnings.warn("what else there is", stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["what else there is"]


def test_the_users_level_of_torchs_own_log_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    assert launch._environment(Config())["TORCH_CPP_LOG_LEVEL"] == "ERROR"
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    assert launch._environment(Config())["TORCH_CPP_LOG_LEVEL"] == "INFO"
