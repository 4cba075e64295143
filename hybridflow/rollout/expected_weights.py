"""Which weights a model has, so that an engine is given all of them and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from transformers import AutoConfig

from hybridflow.errors import EngineError, listed
from hybridflow.models.checkpoint_names import CheckpointNames
from hybridflow.models.load import skeleton


class ExpectedWeights:
    """Names and shapes of a model's weights as transformers has them, without loading any."""

    def __init__(self, model: str, *, trust_remote_code: bool = False):
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        empty = skeleton(config, trust_remote_code=trust_remote_code)
        self.checkpoint_names = CheckpointNames(empty)
        parameters = list(empty.named_parameters(remove_duplicate=False))
        self.shapes = {name: parameter.shape for name, parameter in parameters}
        first_name: dict[int, str] = {}
        self.first_names = {name: first_name.setdefault(id(parameter), name) for name, parameter in parameters}
        """A tied weight counts as given under any of its names."""

    def of(self, weights: Iterable[tuple[str, torch.Tensor]]) -> CheckedWeights:
        """The weights, checked as they pass."""
        return CheckedWeights(self, weights)


class CheckedWeights:
    """An iterator over weights that ends early at one that does not belong.

    It ends and does not raise, so that an engine in the middle of a load can finish and stays usable; `finish` raises.
    """

    def __init__(self, expected: ExpectedWeights, weights: Iterable[tuple[str, torch.Tensor]]):
        self.expected, self.weights = expected, weights
        self.given: set[str] = set()
        self.fault = ""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.weights:
            shape = self.expected.shapes.get(name)
            if shape != tensor.shape:
                expected = "is unknown to the engine" if shape is None else f"has shape {tuple(shape)} in the engine"
                self.fault = f"weight {name!r} of shape {tuple(tensor.shape)} {expected}"
                return
            self.given.add(self.expected.first_names[name])
            yield name, tensor

    def finish(self) -> None:
        """Raise where a weight did not belong or was not given.

        Raises:
            EngineError: it names the weight. The engine then holds some of the new weights and some of the old ones.
        """
        if self.fault:
            raise EngineError(self.fault)
        names = dict.fromkeys(self.expected.first_names.values())
        if missing := [name for name in names if name not in self.given]:
            raise EngineError(f"{len(missing)} of {len(names)} weights were not given to the engine: {listed(missing)}")
