"""Reinforcement learning of language models as a dataflow among roles, on Ray."""

from typing import TYPE_CHECKING

from hybridflow.api import History as History

if TYPE_CHECKING:
    from hybridflow.api import train as train

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`hybridflow.train`, which is the function and the module of the command in one: always the same, whoever asks first."""
    if name == "train":
        import importlib

        return importlib.import_module("hybridflow.train")
    raise AttributeError(f"module 'hybridflow' has no attribute {name!r}")
