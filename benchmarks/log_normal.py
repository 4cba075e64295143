"""GRPO whose responses have lengths like those of reasoning: a few are ten times as long as most.

Models with random weights never end by themselves, so each row gets a limit of its own, from a log-normal distribution.
"""

from __future__ import annotations

import numpy as np

from hybridflow.algorithms.grpo import GRPO
from hybridflow.batch import Batch
from hybridflow.rollout.seeds import mixed_seed

MEAN_TOKENS = 400.0
"""Of the distribution, before the cut at data.max_response_tokens."""
LOG_STD = 1.0


class LogNormalGRPO(GRPO):
    """GRPO with a limit for each row that is a function of its seed."""

    def collect(self, prompts: Batch) -> Batch:
        """As GRPO's, with column `max_response_tokens`."""
        rows = prompts.repeat(self.config.responses_per_prompt)
        longest = self.run.data.max_response_tokens
        mean = min(MEAN_TOKENS, longest / 10)
        seeds = mixed_seed(rows["seed"], rows["sample"])
        normal = np.array([np.random.default_rng(seed).normal() for seed in seeds.tolist()])
        lengths = np.exp(np.log(mean) - LOG_STD**2 / 2 + LOG_STD * normal)
        return self.respond(rows.with_columns(max_response_tokens=np.clip(lengths, 1, longest).astype(np.int64)))
