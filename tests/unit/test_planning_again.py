"""A folder's plan holds for a run that goes on from a checkpoint there, and for no other. No Ray: ranks have answered."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.checkpoint.plan_note import read_note
from hybridflow.checkpoint.store import CheckpointStore, RunState
from hybridflow.config.schema import CheckpointConfig, Config, RunConfig
from hybridflow.controller import planning
from hybridflow.controller.placement import places
from hybridflow.controller.planning import RunPlan
from hybridflow.planner.memory import GIB, Gpu
from hybridflow.workers.hardware import HardwareInfo
from tests.unit.test_planner_search import HALF_BILLION, PPO

ROLES = ("actor", "critic", "reference", "rollout")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(planning.ray, "get", lambda answers: answers)
    return replace(PPO, run=RunConfig(folder=str(tmp_path), total_steps=5000))


def decide(config: Config, *, free: float) -> RunPlan:
    """The plan on one GPU of 79.2 GiB, for a run that begins or goes on."""
    plan = planned(config, free=free)
    plan.keep()
    return plan


def planned(config: Config, *, free: float) -> RunPlan:
    found = HardwareInfo(Gpu(total=int(79.2 * GIB), free=int(free * GIB)), dict.fromkeys(ROLES, HALF_BILLION))
    return planning.decide(config, places(config, ("data", *ROLES, "reward")), {"main": [found]})  # type: ignore[list-item]


def save(config: Config) -> None:
    store = CheckpointStore(config.run.folder)
    with store.writing(1) as folder:
        store.write_state(folder, RunState(step=1, config={}))


def test_a_start_without_a_checkpoint_decides_anew_and_its_plan_replaces_the_bad_one(config: Config) -> None:
    crowded = decide(config, free=22)
    alone = decide(config, free=78.7)
    assert crowded.decisions.options and not alone.decisions.options
    save(config)
    assert decide(config, free=72).decisions == alone.decisions


def test_a_run_that_goes_on_says_that_it_keeps_its_plan(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    first = decide(config, free=78.7)
    save(config)
    with caplog.at_level(logging.INFO, logger="hybridflow"):
        short = replace(config, run=replace(config.run, total_steps=10))
        assert decide(short, free=72).decisions == first.decisions and first.decisions.is_compiled
    assert "as decided before: the run goes on" in caplog.text and "model.compile is on: as decided before" in caplog.text


def test_never_decides_anew_beside_a_checkpoint(config: Config) -> None:
    crowded = decide(config, free=22)
    save(config)
    assert decide(config, free=78.7).decisions.options == crowded.decisions.options
    begun = decide(replace(config, checkpoint=CheckpointConfig(resume="never")), free=78.7)
    assert not begun.decisions.options


def test_what_the_user_had_set_about_compiling_is_no_decision(config: Config) -> None:
    decide(replace(config, model=replace(config.model, compile=False)), free=78.7)
    save(config)
    assert read_note(Path(config.run.folder)).is_compiled is None
    assert decide(config, free=78.7).decisions.is_compiled is True  # 5000 steps pay


def test_a_start_that_is_refused_leaves_the_plan_as_it_was(config: Config) -> None:
    decide(config, free=78.7)
    save(config)
    before = (Path(config.run.folder) / "plan.json").read_text()
    other = planned(replace(config, checkpoint=CheckpointConfig(resume="never")), free=22)
    assert other.decisions.options and (Path(config.run.folder) / "plan.json").read_text() == before
