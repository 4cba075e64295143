"""Reinforcement learning of language models as a dataflow among roles, on Ray."""

__version__ = "0.1.0"
