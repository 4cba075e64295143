"""What `hybridflow.ops` offers, at run time and to the type checker."""

from __future__ import annotations

import importlib
import pkgutil

from hybridflow import ops

NOT_OFFERED = {"mismatch"}
"""Modules that are used by their own name."""


def test_ops_offers_exactly_what_its_modules_export() -> None:
    modules = {name for _, name, _ in pkgutil.iter_modules(ops.__path__)} - NOT_OFFERED
    exported = {name: set(importlib.import_module(f"hybridflow.ops.{name}").__all__) for name in modules}
    assert exported == {name: set(names) for name, names in ops._NAMES.items()}
    assert all(getattr(ops, name) is not None for names in exported.values() for name in names)
