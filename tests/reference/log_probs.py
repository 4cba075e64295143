"""Log-probabilities and entropies in NumPy float64, one token at a time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def log_probs_and_entropy(
    hidden: Floats, weight: Floats, targets: npt.NDArray[np.int64], temperature: float, bias: Floats | None = None
) -> tuple[Floats, Floats]:
    """Of each target and of each distribution, in nats."""
    log_probs, entropies = [], []
    for state, target in zip(hidden, targets, strict=True):
        logits = np.array([float(np.dot(state, row)) for row in weight])
        logits = (logits if bias is None else logits + bias) / temperature
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        log_probs.append(np.log(probabilities[target]))
        entropies.append(-sum(p * np.log(p) for p in probabilities))
    return np.array(log_probs), np.array(entropies)
