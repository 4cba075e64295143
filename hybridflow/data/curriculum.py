"""In which order an epoch goes through its prompts, where that is not by chance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
SUCCESS_RATE = "success_rate"
UNKNOWN = -1.0
"""Success rate of a prompt that was not answered yet."""


class Curriculum(ABC):
    """Says by which numbers an epoch is ordered, from low to high."""

    @abstractmethod
    def keys(self, stream: int, epoch: int, rows: slice) -> Numbers:
        """One number for each of a stream's rows, the same whenever an epoch is asked about."""

    def note(self, rows: Rows, rates: Numbers) -> None:  # noqa: B027, not every order depends on it
        """These rows were answered with these success rates."""

    def state_dict(self) -> dict[str, object]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:  # noqa: B027, likewise
        """Take back what `state_dict` gave."""


class ByColumn(Curriculum):
    """By a column of the files: each epoch goes from its lowest to its highest numbers; rows without one come last."""

    def __init__(self, values: Sequence[object]):
        self.values = np.array([np.inf if value is None else float(str(value)) for value in values], np.float64)

    def keys(self, stream: int, epoch: int, rows: slice) -> Numbers:
        return self.values[rows]


class BySuccess(Curriculum):
    """By what this run has answered: each epoch goes from the prompts that succeeded most often, when they were answered last,
    to those that never did; what was not answered yet comes in between, as half a success would.

    Example:
        >>> order = BySuccess(num_rows=3)
        >>> order.note(np.array([0, 2]), np.array([0.25, 1.0]))
        >>> order.keys(0, 0, slice(0, 3)).argsort()  # the row that always succeeds first
        array([2, 1, 0])
    """

    def __init__(self, num_rows: int):
        self.rates = np.full(num_rows, UNKNOWN)
        self.at_start: dict[tuple[int, int], Numbers] = {}
        """Stream and epoch -> the keys with which it began: an epoch keeps its order while rates change."""

    def keys(self, stream: int, epoch: int, rows: slice) -> Numbers:
        if (stream, epoch) not in self.at_start:
            rates = self.rates[rows]
            self.at_start[stream, epoch] = -np.where(rates == UNKNOWN, 0.5, rates)
            self.at_start.pop((stream, epoch - 2), None)
        return self.at_start[stream, epoch]

    def note(self, rows: Rows, rates: Numbers) -> None:
        self.rates[rows] = rates

    def state_dict(self) -> dict[str, object]:
        started = [[*key, keys.tolist()] for key, keys in self.at_start.items()]
        return {"rates": self.rates.tolist(), "at_start": started}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        rates, started = state.get("rates"), state.get("at_start")
        if isinstance(rates, list) and isinstance(started, list):
            self.rates = np.array(rates, np.float64)
            self.at_start = {(stream, epoch): np.array(keys, np.float64) for stream, epoch, keys in started}
