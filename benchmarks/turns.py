"""Tokens per second of episodes with two turns against one turn of as many tokens, on one rank.

    python -m benchmarks.turns MODEL --engine vllm --episodes 64 --tokens 256

Both sample the same number of tokens to the same number of prompts, without an end of sequence; what the environment says comes
on top. The first measurement of each is a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, DataConfig, EnvironmentConfig, ModelConfig, RolloutConfig
from hybridflow.parallel.layout import Layout
from hybridflow.workers.base import RankContext
from hybridflow.workers.rollout import RolloutWorker, training_sampling

ENVIRONMENT = """
class Endless:
    def reset(self, row): return row["messages"], {}
    def step(self, message): return [{"role": "user", "content": "on"}], 0.0, False, False, {}
"""


def rows(count: int) -> Batch:
    """Prompts of a few tokens."""
    batch = Batch.from_columns(
        {
            "prompt": Ragged.from_rows([[1]] * count, np.int32),
            "messages": [[{"role": "user", "content": f"Tell me of the number {number}."}] for number in range(count)],
            "ground_truth": [None] * count,
            "data_source": [""] * count,
            "extra_info": [{}] * count,
        }
    )
    return batch.with_columns(seed=np.arange(count))


def main() -> None:
    """Measure both in turn, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="sampled in each episode")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "turns.py")
        file.write_text(ENVIRONMENT)
        config = Config(
            model=ModelConfig(path=options.model),
            data=DataConfig(max_prompt_tokens=128, max_response_tokens=options.tokens + 128),
            rollout=RolloutConfig(engine=options.engine, max_num_seqs=options.episodes, ignore_eos=True),
        )
        limits = {
            turns: EnvironmentConfig(path=str(file), max_turns=turns, max_turn_tokens=options.tokens // turns)
            for turns in (1, 2)
        }
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        context = RankContext(role="rollout", rank=0, layout=Layout(), device=device)
        worker = RolloutWorker(replace(config, environment=limits[1]), context)
        measured: dict[int, list[float]] = {turns: [] for turns in limits}
        for repeat in range(options.repeats + 1):
            for turns, environment in limits.items():
                # One engine for both; episodes take their limits from here.
                worker.config = worker.environment.config = replace(config, environment=environment)
                started = time.perf_counter()
                answered = worker.generate(rows(options.episodes), sampling=training_sampling(config))
                seconds = time.perf_counter() - started
                assert (answered["loss_tokens"] == options.tokens).all() and (answered["environment/turns"] == turns).all()
                measured[turns] += [options.episodes * options.tokens / seconds] if repeat else []
        worker.close()
        medians = {turns: statistics.median(found) for turns, found in measured.items()}
        told = {"engine": options.engine, "episodes": options.episodes, "tokens": options.tokens, "tokens_per_second": measured}
        print(json.dumps({**told, "two_turns_over_one": medians[2] / medians[1]}))


if __name__ == "__main__":
    main()
