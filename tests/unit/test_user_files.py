"""Code of the user's in files: whose imports are taken, and what is refused before anything starts."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow import registry
from hybridflow.config.schema import RewardConfig
from hybridflow.config.user_code import name_errors
from hybridflow.errors import ConfigError, UserFileError
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Score
from hybridflow.user_file import import_file, split_name
from tests.unit.test_reward_worker import inputs

SCORE = "def compute_score(reward_input):\n    return VALUE\n"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


IMPORTS = [
    "from utils import VALUE",
    "import utils\nVALUE = utils.VALUE",
    "from .utils import VALUE",
    "from . import utils\nVALUE = utils.VALUE",
]


@pytest.mark.parametrize("statement", IMPORTS)
@pytest.mark.parametrize("is_package", [False, True])
def test_what_lies_beside_the_file_is_taken_and_not_what_lies_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statement: str, is_package: bool
) -> None:
    written(tmp_path / "project/utils.py", "VALUE = 0.25")
    written(tmp_path / "rewards/utils.py", "VALUE = 1.0")
    if is_package:
        written(tmp_path / "rewards/__init__.py", "")
    file = written(tmp_path / "rewards/mine.py", f"{statement}\n{SCORE}")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.syspath_prepend("")  # as where the command is started by `python -m`
    pool = RewardPool(RewardConfig(path=str(file), num_processes=1))
    assert pool.score(inputs("a")) == [Score(1.0)]
    pool.close()


def test_what_was_imported_from_elsewhere_under_the_same_name_is_not_taken(tmp_path: Path) -> None:
    for name, value in (("first", 1), ("second", 2)):
        written(tmp_path / name / "beside_both.py", f"VALUE = {value}")
        written(tmp_path / name / "mine.py", "from beside_both import VALUE")
    assert [vars(import_file(str(tmp_path / name / "mine.py")))["VALUE"] for name in ("first", "second")] == [1, 2]


def test_a_relative_import_may_leave_the_folder(tmp_path: Path) -> None:
    written(tmp_path / "common/scores.py", "VALUE = 3.0")
    file = written(tmp_path / "rewards/mine.py", f"from ..common.scores import VALUE\n{SCORE}")
    assert vars(import_file(str(file)))["VALUE"] == 3.0
    assert not list(name_errors("reward.path", file, "compute_score"))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from .helper import x", r"imports '.helper', and there is no .*helper.py"),
        ("from . import helper", r"imports '.helper'"),
        ("from ..nowhere.deep import x", r"imports '..nowhere.deep'"),
        ("def f():\n    from .helper import x", r"imports '.helper'"),
        ("import no_such_package_at_all", r"'no_such_package_at_all', which is neither beside it nor installed"),
        ("from .inner import Part", r"inner.py, line 1, imports '.innermost'"),
    ],
)
def test_imports_that_cannot_work_are_told_without_running_the_file(tmp_path: Path, source: str, problem: str) -> None:
    written(tmp_path / "inner.py", "from .innermost import Part")
    file = written(tmp_path / "mine.py", f"{source}\nraise RuntimeError('executed')\nclass Part: ...")
    (error,) = name_errors("placement.workers.judge", file, "Part")
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(error.problem)


def test_a_name_in_a_file_is_looked_up_by_every_table(tmp_path: Path) -> None:
    file = written(tmp_path / "parts.py", "class Part: ...")
    for table in (registry.ALGORITHMS, registry.ROLES, registry.ENGINES, registry.TRACKERS, registry.REWARDS):
        part = registry.load(f"{file}:Part", table, key="some.key")
        assert isinstance(part, type) and part.__name__ == "Part"
    with pytest.raises(ConfigError, match=r"some.key.*has no 'Prat'; did you mean 'Part'"):
        registry.load(f"{file}:Prat", registry.ROLES, key="some.key")
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean 'parts.py'"):
        registry.load(f"{tmp_path}/part.py:Part", registry.ROLES, key="some.key")


def test_other_processes_that_import_the_file_can_unpickle_its_classes(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "from dataclasses import dataclass\n@dataclass\nclass Loss:\n    clip: float = 0.2\n")
    pickled = pickle.dumps(vars(import_file(str(file)))["Loss"](0.5))
    code = "import pickle; from hybridflow.user_file import import_file"
    code += f"; import_file({str(file)!r}); print(pickle.loads({pickled!r}).clip)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert found.stdout.strip() == "0.5"


def test_a_file_that_has_changed_is_imported_anew(tmp_path: Path) -> None:
    file = written(tmp_path / "mine.py", "VALUE = 1")
    first = import_file(str(file))
    assert import_file(str(file)) is first
    assert vars(import_file(str(written(file, "VALUE = 2"))))["VALUE"] == 2


@pytest.mark.parametrize("source", ["def f(:", "raise SystemExit(0)", "1 / 0", "import no_such_package_at_all"])
def test_a_file_that_does_not_import_says_why(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserFileError, match="the file does not import: "):
        import_file(str(written(tmp_path / "mine.py", source)))


def test_installed_modules_stay_what_they_are(tmp_path: Path) -> None:
    written(tmp_path / "numpy.py", "ndarray = None")
    before = sys.modules["numpy"]
    import_file(str(written(tmp_path / "mine.py", "VALUE = 1")))
    assert sys.modules["numpy"] is before
    sys.path.remove(str(tmp_path))


def test_only_what_ends_in_py_is_a_file() -> None:
    assert split_name("a/b.py:C") == ("a/b.py", "C")
    assert split_name("my_package.module:C") is None
    assert split_name("ppo") is None
