"""Rules about environments: the user's file is read before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config_cases import mistakes_of, only_mistake, right_run

GAME = "class Game:\n    def reset(self, row): ...\n    def step(self, message): ...\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "game.py"
    path.write_text(GAME)
    return path


def test_a_file_with_an_environment_is_right(file: Path, tmp_path: Path) -> None:
    asked = [f"environment.path={file}", "environment.class_name=Game", "environment.options={level: 3}"]
    assert mistakes_of([*right_run(tmp_path), "algorithm=grpo", *asked]) == []


def test_a_file_with_an_agent_is_right(file: Path, tmp_path: Path) -> None:
    file.write_text("async def run(row, address):\n    return 1.0\n")
    assert mistakes_of([*right_run(tmp_path), "algorithm=grpo", f"environment.path={file}"]) == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("environment.path=nowhere.py", "environment.path: file 'nowhere.py' does not exist"),
        ("environment.class_name=Game", "environment.class_name: found 'Game', but environment.path is not set"),
        ("environment.name=nowhere_at_all:Game", "no module 'nowhere_at_all' is on the Python path"),
        ("environment.tool_format=hermess", "did you mean 'hermes'?"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, override: str, problem: str) -> None:
    assert problem in only_mistake(tmp_path, override)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["environment.class_name=Gam"], "has no 'Gam'; did you mean 'Game'?"),
        (["environment.name=json:loads"], "Leave out one of them"),
        (["algorithm=sft"], "sft generates nothing"),
    ],
)
def test_a_mistake_beside_a_right_file_is_told(file: Path, tmp_path: Path, overrides: list[str], problem: str) -> None:
    found = mistakes_of([*right_run(tmp_path), f"environment.path={file}", *overrides])
    assert any(problem in mistake for mistake in found), found


def test_a_file_that_is_not_python_or_has_no_class_is_told(file: Path, tmp_path: Path) -> None:
    file.write_text("def broken(:")
    assert "is not Python" in only_mistake(tmp_path, f"environment.path={file}")
