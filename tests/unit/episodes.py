"""Rollout workers whose rows are episodes, and rows for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, DataConfig, EnvironmentConfig, ModelConfig, RolloutConfig
from hybridflow.parallel.layout import Layout
from hybridflow.workers.base import RankContext
from hybridflow.workers.rollout import RolloutWorker

CONTEXT = RankContext(role="rollout", rank=0, layout=Layout(), device=torch.device("cpu"))


def episode_config(model: str, file: Path, *, engine: str = "torch", **environment: object) -> Config:
    """One file's environment, turns of 6 tokens, 200 tokens per episode."""
    settings = {"path": str(file), "max_turn_tokens": 6, "timeout_s": 20.0, **environment}
    return Config(
        model=ModelConfig(path=model),
        data=DataConfig(max_prompt_tokens=64, max_response_tokens=200),
        rollout=RolloutConfig(engine=engine, max_num_seqs=16),
        environment=EnvironmentConfig(**settings),  # type: ignore[arg-type]
    )


def worker_of(config: Config) -> RolloutWorker:
    """The rollout role on one rank."""
    return RolloutWorker(config, CONTEXT)


def episode_rows(contents: Sequence[str]) -> Batch:
    """One prompt of role user for each content, which is its ground truth as well."""
    count = len(contents)
    batch = Batch.from_columns(
        {
            "prompt": Ragged.from_rows([[5]] * count, np.int32),
            "messages": [[{"role": "user", "content": content}] for content in contents],
            "ground_truth": list(contents),
            "data_source": ["test"] * count,
            "extra_info": [{} for _ in contents],
        }
    )
    numbers = np.arange(count)
    return batch.with_columns(seed=numbers + 10, call=np.zeros(count, np.int64), position=numbers)
