"""What moves PPO's adaptive weight of the KL."""

from __future__ import annotations

import numpy as np

from hybridflow import ops
from hybridflow.algorithms.ppo import PPO, Config
from hybridflow.batch import Batch


def test_each_response_counts_the_same_in_the_kl_that_moves_the_weight() -> None:
    ppo = PPO.__new__(PPO)
    ppo.config, ppo.kl = Config(kl_controller="adaptive"), ops.kl_controller("adaptive", 0.1, target=0.1, horizon=100.0)
    rows = Batch({"kl": np.array([0.11, 0.19], np.float32), "response_tokens": np.array([30, 10])})
    metrics = ppo.update_kl_coefficient(rows)
    # Means of rows: 0.15, half over the target, of which 0.2 counts; two rows of 100. Over tokens it would be 0.13.
    assert np.isclose(ppo.kl.coefficient, 0.1 * (1 + 0.2 * 2 / 100), rtol=1e-6)
    assert np.isclose(metrics["kl/mean"], 0.13) and metrics["kl/coefficient"] == 0.1
    ppo.update_kl_coefficient(rows.with_columns(kl=np.array([0.1, 0.11], np.float32)))
    assert np.isclose(ppo.kl.coefficient, 0.1 * 1.004 * (1 + 0.05 * 2 / 100), rtol=1e-5)
