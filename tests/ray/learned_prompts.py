"""GRPO that writes down which prompts each step has learned from."""

from __future__ import annotations

import json
from pathlib import Path

from hybridflow.algorithms.grpo import GRPO
from hybridflow.batch import Batch
from hybridflow.metrics import Metrics


class RecordedGRPO(GRPO):
    """As GRPO. A step that is made again after a restart is written down again."""

    def learn(self, batch: Batch) -> Metrics:
        metrics = super().learn(batch)
        folder = Path(self.run.run.folder, "learned")
        folder.mkdir(exist_ok=True)
        folder.joinpath(f"{self.step:03d}.json").write_text(json.dumps(sorted(set(batch["prompt_id"].tolist()))))
        return metrics


def learned(folder: Path) -> list[int]:
    """The prompts of all steps, in order."""
    return sorted(number for file in folder.glob("learned/*.json") for number in json.loads(file.read_text()))
