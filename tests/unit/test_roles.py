"""Which attributes of an algorithm are roles: those annotated with a class of worker, however the module says so."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from hybridflow.algorithms.base import Algorithm
from hybridflow.config.schema import Config, PlacementConfig

WORKERS = """
from hybridflow.workers.base import Worker
class Judge(Worker):
    pass
class Notes:
    pass
"""
ALGORITHM = """
from hybridflow.algorithms.base import Algorithm
from hybridflow.workers.actor import ActorWorker
class Own(Algorithm):
    actor: ActorWorker
    judge: Judge
    history: list[float]
    best: float | None = None
    notes: Notes
    label: str
    def collect(self, prompts): return prompts
    def learn(self, batch): return {}
"""
FUTURE = "from __future__ import annotations\n"
TYPE_CHECKING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "
Load = Callable[[str], type[Algorithm]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The algorithm of a module with this source, beside which lies one with workers."""
    monkeypatch.syspath_prepend(tmp_path)
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}_workers.py").write_text(WORKERS)

    def load(source: str) -> type[Algorithm]:
        (tmp_path / f"{name}.py").write_text(source.replace("WORKERS", f"{name}_workers"))
        found = importlib.import_module(name).Own
        assert isinstance(found, type) and issubclass(found, Algorithm)
        return found

    return load


@pytest.mark.parametrize("first", ["", FUTURE], ids=["evaluated", "as text"])
def test_a_class_of_worker_makes_a_role_and_other_annotations_none(load: Load, first: str) -> None:
    assert load(f"{first}from WORKERS import Judge, Notes\n{ALGORITHM}").roles(Config()) == ("actor", "judge")


@pytest.mark.parametrize("first", ["", FUTURE], ids=["evaluated", "as text"])
def test_a_class_of_worker_may_stand_in_the_same_module(load: Load, first: str) -> None:
    assert load(f"{first}{WORKERS}{ALGORITHM}").roles(Config()) == ("actor", "judge")


def test_a_built_in_class_may_be_imported_for_type_checkers_only(load: Load) -> None:
    hidden = ALGORITHM.replace("from hybridflow.workers.actor", f"{TYPE_CHECKING}from hybridflow.workers.actor")
    assert load(f"{FUTURE}from WORKERS import Judge, Notes\n{hidden}").roles(Config()) == ("actor", "judge")


def test_a_class_that_placement_names_may_be_imported_for_type_checkers_only(load: Load) -> None:
    own = load(f"{FUTURE}{TYPE_CHECKING}from WORKERS import Judge, Notes\n{ALGORITHM}")
    named = Config(placement=PlacementConfig(workers={"judge": "my_package.workers:Judge"}))
    assert own.roles(named) == ("actor", "judge")


def test_roles_of_the_classes_above_come_first_and_unused_ones_are_left_out(load: Load) -> None:
    base = load(f"from WORKERS import Judge, Notes\n{ALGORITHM}")

    class Further(base):  # type: ignore[valid-type, misc]
        history: list[float]
        critic: CriticWorker  # type: ignore[name-defined]  # noqa: F821

        @classmethod
        def unused_roles(cls, run: Config) -> set[str]:
            return {"judge"}

    assert Further.roles(Config()) == ("actor", "critic")
