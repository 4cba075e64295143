"""Training from Python: `hybridflow.train(config)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hybridflow.pickled import name_of

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

    from hybridflow.config.schema import Config

OnStep = Callable[[int, Mapping[str, float]], object]
SHORT = {"algorithm": "algorithm.name", "reward": "reward.name"}
"""Sections that a name may stand for."""


@dataclass
class History:
    """The metrics of a run, as columns.

    Example:
        history = hybridflow.train("configs/quickstart.yaml", run={"total_steps": 20})
        history["reward/mean"][-1], history.to_pandas().plot(y="reward/mean")
    """

    folder: Path
    """The run's folder: checkpoints, rollouts, metrics.jsonl."""
    steps: list[int] = field(default_factory=list)
    """Of each entry of a column; 0 is the validation before training."""
    columns: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> value at each step, NaN where it was not measured."""

    def __getitem__(self, metric: str) -> list[float]:
        """A column.

        Raises:
            KeyError: nothing of that name was measured.
        """
        if metric not in self.columns:
            raise KeyError(f"{metric!r} was not measured. Found: {', '.join(self.columns)}")
        return self.columns[metric]

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a step."""
        for name in metrics:
            self.columns.setdefault(name, [math.nan] * len(self.steps))
        self.steps.append(step)
        for name, column in self.columns.items():
            column.append(float(metrics.get(name, math.nan)))

    def to_pandas(self) -> pandas.DataFrame:
        """As a table with one row per step. Needs pandas."""
        import pandas

        return pandas.DataFrame(self.columns, index=pandas.Index(self.steps, name="step"))


class TrainModule(ModuleType):
    """`hybridflow.train` is the module of the command as soon as somebody has imported that, and a function to who calls it."""

    def __call__(self, config: str | Path | Mapping[str, object] | Config, **options: Any) -> History:
        """As `train`."""
        return train(config, **options)


def train(
    config: str | Path | Mapping[str, object] | Config,
    *,
    overrides: Sequence[str] = (),
    on_step: OnStep | None = None,
    **sections: Mapping[str, object],
) -> History:
    """Train, and return the metrics of each step.

    `config` is a YAML file, a nested dict with the keys of one, or a `Config`. Over a file or a dict go `sections`
    (`run={"total_steps": 20}`) and `overrides` (`"run.seed=3"`). Where a key takes a name, a class or function may stand:
    `algorithm=MyAlgorithm`, `reward={"name": my_function}`, `trackers={"names": [MyTracker]}`; such that were defined in a
    notebook are pickled into the run's folder.

    `on_step(step, metrics)` is called after each step, validation before training being step 0. If it returns False the run
    ends there, with a checkpoint where `checkpoint.save_last` is set. What it raises ends the run.

    Example:
        def exact(reward_input):
            return float(reward_input["response"] == reward_input["ground_truth"])

        history = hybridflow.train("configs/quickstart.yaml", reward={"name": exact}, run={"total_steps": 5})
        history["reward/mean"]  # [0.11, 0.13, 0.12, 0.15, 0.16]

    Raises:
        ConfigError: the configuration has mistakes, all of which it names.
        HybridflowError: the run failed.
    """
    from hybridflow.config.schema import Config

    checked = _checked(config) if isinstance(config, Config) else _loaded(config, overrides, sections)
    if isinstance(config, Config) and (overrides or sections):
        raise TypeError("a Config is complete: use dataclasses.replace, or give a file or a dict to put something over")
    from hybridflow.controller.run import prepared

    history = History(Path(checked.run.folder))

    def note(step: int, metrics: Mapping[str, float]) -> object:
        history.add(step, metrics)
        return on_step(step, metrics) if on_step is not None else None

    with prepared(checked) as loop:
        loop.run(note)
    return history


def _loaded(config: str | Path | Mapping[str, object], overrides: Sequence[str], sections: Mapping[str, object]) -> Config:
    from hybridflow.config.load import load_config

    given = dict(config) if isinstance(config, Mapping) else {}
    folder = Path(_run_folder(given, overrides, sections)).expanduser()
    base = _named(given, folder) if isinstance(config, Mapping) else str(config)
    return load_config(base, overrides, over=_named(sections, folder), asks_hub=True)


def _run_folder(given: Mapping[str, object], overrides: Sequence[str], sections: Mapping[str, object]) -> str:
    """Where objects without a name go: the run's folder, as far as it can be told before the configuration is read."""
    from hybridflow.config.schema import Config

    for override in reversed(overrides):
        if override.startswith("run.folder="):
            return override.partition("=")[2]
    for tree in (sections, given):
        run = tree.get("run")
        if isinstance(run, Mapping) and "folder" in run:
            return str(run["folder"])
    return Config().run.folder


def _named(tree: Mapping[str, object], folder: Path, path: str = "") -> dict[str, object]:
    """The tree with names in place of classes and functions."""
    named: dict[str, object] = {}
    for key, value in tree.items():
        place = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            named[str(key)] = _named(value, folder, place)
        elif isinstance(value, list | tuple):
            named[str(key)] = [_name(element, folder, f"{place}.{number}") for number, element in enumerate(value)]
        elif place in SHORT and callable(value):
            named[str(key)] = {"name": _name(value, folder, SHORT[place])}
        else:
            named[str(key)] = _name(value, folder, place)
    return named


def _name(value: object, folder: Path, place: str) -> object:
    if isinstance(value, Path):
        return str(value)
    return name_of(value, folder.absolute() / "objects" / f"{place}.pkl") if callable(value) else value


def _checked(config: Config) -> Config:
    """A configuration that was built in Python, against the rules.

    Raises:
        ConfigError: with every error found.
    """
    from hybridflow.config.load import load_algorithm
    from hybridflow.config.rules import check
    from hybridflow.errors import ConfigError, FieldError

    reports = check(config, load_algorithm(config.algorithm.name), asks_hub=True)
    if errors := [report for report in reports if isinstance(report, FieldError)]:
        raise ConfigError(errors)
    return config
