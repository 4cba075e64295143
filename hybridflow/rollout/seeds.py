"""Seeds and random numbers of requests, as numbers of the host: pure functions, which need no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def uniform(seeds: npt.NDArray[np.uint64], numbers: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each pair of seed and token number, by SplitMix64 (Steele, Lea, Flood 2014).

    52 bits, so that its product with a sum of probabilities stays below that sum after rounding.
    """
    mixed = mix(mix(seeds) + np.uint64(0x9E3779B97F4A7C15) * (numbers.astype(np.uint64) + np.uint64(1)))
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def mixed_seed(*parts: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """One seed of 63 bits for each row from several numbers; different numbers give different seeds, practically."""
    mixed = np.zeros(len(parts[0]), np.uint64)
    for part in parts:
        mixed = mix(mixed + np.uint64(0x9E3779B97F4A7C15) + part.astype(np.int64).view(np.uint64))
    return (mixed >> np.uint64(1)).astype(np.int64)


def mix(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The last part of SplitMix64: every bit of the result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
