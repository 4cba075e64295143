"""Runs of the real loop, folder, trackers and checkpoints over a role that only counts: a moment each, without Ray."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hybridflow.algorithms.grpo import Config as GrpoOptions
from hybridflow.checkpoint.lineage import GROWING
from hybridflow.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    Config,
    ModelConfig,
    RunConfig,
    TrackerConfig,
    ValidationConfig,
)
from hybridflow.controller.boundary import how_to_go_on
from hybridflow.controller.checkpoints import Checkpoints, num_lines
from hybridflow.controller.loop import Loop
from hybridflow.controller.run_folder import RunFolder, reserved
from hybridflow.errors import CheckpointError, DamagedCheckpointError, HybridflowError
from hybridflow.metrics import Metrics

NUM_STEPS, EVERY = 8, 2
PLANS: list[object] = []
"""One more for each start that was not refused."""
Hook = Callable[[int], AbstractContextManager[object] | None]


@dataclass
class Counting:
    """A role whose state is one number, a function of all its steps. It refuses the number of another model."""

    model: str
    value: int = 1

    def save(self, folder: str) -> None:
        Path(folder, "value").write_text(f"{self.model} {self.value}")

    def restore(self, folder: str) -> None:
        model, _, value = Path(folder, "value").read_text().partition(" ")
        if not value:
            raise DamagedCheckpointError(f"{folder}/value should hold a model and a number")
        if model != self.model:
            raise CheckpointError(f"{folder} is of model {model}, not of {self.model}")
        self.value = int(value)


@dataclass
class Groups:
    """Stands for `Launched`, and for its log of calls."""

    groups: dict[str, Counting]
    validation: None = None
    rollout: None = None

    @property
    def log(self) -> Groups:
        return self

    def take_spans(self) -> list[object]:
        return []

    def keep_plan(self) -> None:
        PLANS.append(self)


class NoRows:
    """Stands for `RowSource`: nothing is under way."""

    def save(self, folder: Path) -> dict[str, object]:
        return {}

    def restore(self, folder: Path, state: Mapping[str, object]) -> None:
        assert state == {}

    def close(self) -> None:
        return


class NoAlgorithm:
    """Stands for an algorithm with one number of its own."""

    def __init__(self) -> None:
        self.coefficient = 0.5

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.coefficient = state["coefficient"]


class CountingLoop(Loop):
    """The loop with a step that costs nothing. `hook` is called with each step's number before it."""

    def __init__(self, config: Config, folder: RunFolder, hook: Hook):
        self.config, self.folder, self.hook = config, folder, hook
        self.total_steps = config.run.total_steps or 0
        self.worker = Counting(model=config.model.path)
        launched: Any = Groups({"actor": self.worker, "data": Counting(model="data")})
        rows: Any = NoRows()
        algorithm: Any = NoAlgorithm()
        self.rows, self.algorithm, self.launched, self.weights = rows, algorithm, launched, rows
        self.checkpoints = Checkpoints(config, launched, algorithm, rows, total_steps=self.total_steps)
        self.seconds_saving = Metrics()
        self.saving = None

    def step(self, step: int) -> Metrics:
        with self.hook(step) or nullcontext():
            self.worker.value = (self.worker.value * 31 + step) % 1_000_003
        return Metrics({"value": float(self.worker.value)})


@dataclass
class Ended:
    """How a command ended."""

    message: str = ""
    """Of the error; empty where the run was done."""
    advice_when_stopped: str = ""
    values: list[tuple[int, float]] = field(default_factory=list)
    """Step and value of each line of metrics.jsonl."""

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.values]


def config_of(folder: Path, settings: Mapping[str, str]) -> Config:
    """The configuration of a run with `settings` (`checkpoint.resume`, `checkpoint.keep`, `model.path`, `run.total_steps`,
    `algorithm`) over those of the tests."""
    config = Config(
        run=RunConfig(folder=str(folder), total_steps=int(settings.get("run.total_steps", NUM_STEPS))),
        algorithm=AlgorithmConfig(name=settings.get("algorithm", "grpo"), options=GrpoOptions()),
        model=ModelConfig(path=settings.get("model.path", "m"), lora_rank=int(settings.get("model.lora_rank", "0"))),
        trackers=TrackerConfig(names=()),
        validation=ValidationConfig(before_training=False, every_steps=0),
    )
    keep, resume = int(settings.get("checkpoint.keep", "0")), settings.get("checkpoint.resume", "auto")
    return replace(config, checkpoint=CheckpointConfig(every_steps=EVERY, keep=keep, resume=resume))


def command(folder: Path, hook: Hook = lambda step: None, **settings: str) -> Ended:
    """Run the command once; dots of keys are written as two underscores."""
    config = config_of(folder, {key.replace("__", "."): value for key, value in settings.items()})
    ended = Ended()
    try:
        with reserved(config) as taken:
            CountingLoop(config, taken, hook).run()
    except HybridflowError as error:
        ended.message = str(error)
    ended.advice_when_stopped = how_to_go_on(config)
    path = folder / GROWING[0]
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    ended.values = [(line["step"], line["value"]) for line in lines]
    assert num_lines(path) == len(lines)
    return ended


def whole_run() -> list[tuple[int, float]]:
    """Step and value of each step of a run that nothing disturbs, by the rule of `CountingLoop.step`."""
    values, value = [], 1
    for step in range(1, NUM_STEPS + 1):
        value = (value * 31 + step) % 1_000_003
        values.append((step, float(value)))
    return values
