"""Reinforcement learning of language models as a dataflow among roles, on Ray."""

from hybridflow.api import History as History
from hybridflow.api import train as train

__version__ = "0.1.0"
