"""What a rank's process does before it is asked for anything."""

from __future__ import annotations

import logging
import os
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from hybridflow import registry
from hybridflow.config.schema import Config, RolloutConfig
from hybridflow.controller import rank_process, waiting
from hybridflow.workers.base import Worker


@pytest.mark.parametrize("role", registry.ROLES)
def test_what_a_role_will_import_is_there(role: str) -> None:
    worker = registry.load(role, registry.ROLES, key="role")
    assert isinstance(worker, type) and issubclass(worker, Worker)
    for module in worker.imports(Config()):
        assert find_spec(module) is not None, module


@pytest.mark.parametrize("engine", ["my_package.engines:Engine", "path/to/engine.py:Engine"])
def test_an_engine_of_the_users_own_is_imported_by_its_module(engine: str) -> None:
    worker = registry.load("rollout", registry.ROLES, key="role")
    assert isinstance(worker, type) and issubclass(worker, Worker)
    found = worker.imports(Config(rollout=RolloutConfig(engine=engine)))
    assert ("my_package.engines" in found) == engine.startswith("my_package") and not any("/" in name for name in found)


def test_a_module_that_cannot_be_imported_is_left_to_whoever_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raises_when_imported.py").write_text("raise RuntimeError('no')")
    (tmp_path / "imported_after_it.py").write_text("import os; os.environ['IMPORTED_AFTER_IT'] = 'yes'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("IMPORTED_AFTER_IT", raising=False)
    rank_process._import_all(["no_such_module_anywhere", "raises_when_imported", "imported_after_it"])
    assert os.environ.pop("IMPORTED_AFTER_IT") == "yes"


def test_compiled_kernels_are_kept_in_the_users_cache_by_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    rank_process._keep_what_is_compiled()
    folder = tmp_path / "hybridflow" / f"torch-{version('torch')}"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder) and folder.is_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of the user")
    rank_process._keep_what_is_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "of the user"


def test_only_what_takes_long_is_told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    with caplog.at_level(logging.INFO, logger="hybridflow"):
        with waiting.told("a moment"):
            pass
        monkeypatch.setattr(waiting, "TOLD_FROM_S", 0.01)
        with waiting.told("a while"):
            time.sleep(0.02)
    assert caplog.messages == ["a while took 0 s"]
