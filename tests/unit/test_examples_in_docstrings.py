"""What docstrings show is what the code gives."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import hybridflow

PACKAGE = Path(hybridflow.__file__).parent
WITH_EXAMPLES = sorted(file for file in PACKAGE.rglob("*.py") if ">>> " in file.read_text(encoding="utf-8"))
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("file", WITH_EXAMPLES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_the_examples_of_a_module_are_true(file: Path) -> None:
    if file.stem.startswith("vllm_"):
        pytest.importorskip("vllm", reason="vllm is not installed")
    module = importlib.import_module(".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts))
    results = doctest.testmod(module, optionflags=FLAGS)
    assert results.attempted and not results.failed


def test_pure_functions_have_examples() -> None:
    assert len(WITH_EXAMPLES) >= 40, "these pages are read in place of running the code"
