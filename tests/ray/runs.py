"""Whole runs on toy problems: their files, the ordinary command that runs them, and what they leave behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hybridflow.checkpoint.sharded import load_sharded, read_metadata
from hybridflow.data.prepare import PreparedRow, write_parquet
from hybridflow.train import main

HERE = Path(__file__).parent
UNREPEATABLE = ("time", "tokens_per_second", "mfu", "seconds/", "memory/", "controller/")
"""What metrics that differ from run to run begin with: they measure the machine, not the training. So does `sync/seconds`."""


@dataclass(frozen=True)
class Toy:
    """Data, model and configuration of toy runs. Read only."""

    folder: Path
    model: str

    @property
    def config(self) -> Path:
        """Two steps of PPO on one rank, without validation and checkpoints."""
        return self.folder / "toy.yaml"

    @property
    def data(self) -> Path:
        """Prompts of various lengths with ground truths and responses."""
        return self.folder / "train.parquet"


def make_toy(folder: Path, model: str) -> Toy:
    """Write 40 prompts and the configuration to `folder`."""
    toy = Toy(folder, model)
    rows = [
        PreparedRow(
            prompt=" + ".join(["12"] * (1 + number % 5)) + f" + {number} = ",
            ground_truth=str(12 * (1 + number % 5) + number),
            data_source="hybridflow/arithmetic",
            response=f"#### {12 * (1 + number % 5) + number}",
        )
        for number in range(40)
    ]
    write_parquet(rows, toy.data)
    toy.config.write_text(yaml.safe_dump(_settings(toy)))
    return toy


def _settings(toy: Toy) -> dict[str, object]:
    training = {"learning_rate": 1e-3, "tokens_per_microbatch": 256}
    return {
        "run": {"total_steps": 2, "device": "cpu", "timeout_s": 120},
        "algorithm": {"name": "ppo", "responses_per_prompt": 2},
        "model": {"path": toy.model},
        "data": {
            "train_files": [str(toy.data)],
            "prompts_per_step": 4,
            "max_prompt_tokens": 96,
            "max_response_tokens": 8,
        },
        "actor": training,
        "critic": training,
        "rollout": {"engine": "torch"},
        "validation": {"before_training": False, "max_prompts": 6},
        "reward": {"path": str(HERE / "digit_share.py"), "num_processes": 1},
        "checkpoint": {"save_last": False},
        "trackers": {"names": []},
    }


def trained(toy: Toy, folder: Path, *overrides: str) -> list[dict[str, float]]:
    """Run the training command in this process; returns the lines of metrics.jsonl, in `folder`."""
    assert main([str(toy.config), f"run.folder={folder}", *overrides]) == 0, "the run failed: see the captured log"
    return metrics_of(folder)


def metrics_of(run_folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def differences(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> list[str]:
    """Where the metrics of two runs differ, apart from those that measure the machine."""
    found = [f"{len(ours)} lines and {len(theirs)}"] if len(ours) != len(theirs) else []
    for our_line, their_line in zip(ours, theirs, strict=False):
        for name in sorted(our_line.keys() | their_line.keys()):
            is_repeatable = not name.startswith(UNREPEATABLE) and "/seconds" not in name
            if is_repeatable and our_line.get(name) != their_line.get(name):
                found.append(f"step {their_line['step']}: {name} is {our_line.get(name)} and {their_line.get(name)}")
    return found


def state_digests(checkpoint: Path) -> dict[str, str]:
    """Role -> SHA-256 over all its tensors, weights and optimizer, in the order of their names."""
    return {folder.name: _digest(folder) for folder in sorted(checkpoint.iterdir()) if (folder / ".metadata").is_file()}


def _digest(folder: Path) -> str:
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in read_metadata(str(folder)).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load_sharded(str(folder), dict(tensors), None)
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()
