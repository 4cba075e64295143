"""What docstrings show is what the code gives."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize("module", ["hybridflow.parallel.layout", "hybridflow.data.balance", "hybridflow.ops.log_probs"])
def test_the_examples_of_a_module_are_true(module: str) -> None:
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted and not results.failed
