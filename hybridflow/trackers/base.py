"""What a tracker is, and the one that passes everything on to all trackers of a run."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from hybridflow.config.schema import Config
from hybridflow.errors import ConfigError, FieldError
from hybridflow.metrics import Metrics
from hybridflow.registry import TRACKERS, load
from hybridflow.trackers.behind import Behind

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A response to be looked at by people."""

    prompt: str
    response: str
    ground_truth: str
    """What the dataset holds as the right answer; empty where it holds none."""
    reward: float


class Tracker(ABC):
    """Receives the metrics of each step. Built when the run starts, and again when it is resumed."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        self.config = config
        self.total_steps = total_steps
        self.resume_step = resume_step
        """The step of the checkpoint that the run continues from; 0 for a new run. Later steps will be logged again."""

    @classmethod
    def check(cls, config: Config) -> None:
        """Try what may fail when one is built, before Ray starts. By default one is built in a temporary folder and closed."""
        with TemporaryDirectory(prefix="hybridflow_") as folder:
            cls(replace(config, run=replace(config.run, folder=folder)), 1, 0).close()

    @abstractmethod
    def log(self, step: int, metrics: Metrics) -> None:
        """Take the metrics of a step, validation among them as `validation/...`. Called once per step.

        Step 0 is the validation before training. A step is logged before its checkpoint is committed, so that a resumed
        run finds all steps up to its checkpoint already logged.
        """

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:  # noqa: B027 (a default, not an omission)
        """Take some responses of a validation. By default they are ignored."""

    def flush(self) -> None:  # noqa: B027 (likewise)
        """Write what is held back: a checkpoint is about to be committed, and nothing that was logged may be lost after it."""

    def close(self) -> None:  # noqa: B027 (likewise)
        """Write what is held back. Called once, also after a failure."""


class Trackers(Tracker):
    """All trackers of a run as one: `jsonl` at once, the others on threads of their own.

    A failure of one, or one that hangs, is reported once, in one line, and does not end the run.
    """

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        """Builds `jsonl`, then those that `trackers.names` lists.

        Raises:
            ConfigError: a tracker is unknown or is no Tracker.
        """
        super().__init__(config, total_steps, resume_step)
        classes = {name: tracker_class(name) for name in dict.fromkeys(("jsonl", *config.trackers.names))}
        self._jsonl = classes.pop("jsonl")(config, total_steps, resume_step)
        # Their trials went well: a server that went down since then, or says nothing any more, is not worth the run.
        self._behind = [
            Behind(partial(kind, config, total_steps, resume_step), partial(_report, name)) for name, kind in classes.items()
        ]

    def log(self, step: int, metrics: Metrics) -> None:
        # metrics.jsonl is part of what a run promises, and of what its checkpoint is to find.
        self._jsonl.log(step, metrics)
        for behind in self._behind:
            behind.call(lambda tracker: tracker.log(step, metrics))

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        self._jsonl.log_samples(step, samples)
        for behind in self._behind:
            behind.call(lambda tracker: tracker.log_samples(step, samples))

    def flush(self) -> None:
        self._jsonl.flush()
        for behind in self._behind:
            behind.call(lambda tracker: tracker.flush())

    def close(self) -> None:
        try:
            self._jsonl.close()
        finally:
            for behind in self._behind:
                behind.close()


def _report(name: str, what: str) -> None:
    logger.warning("tracker %r %s. It may miss values from here on; metrics.jsonl has them all", name, what)


def tracker_class(name: str) -> type[Tracker]:
    """The class that an entry of `trackers.names` stands for.

    Raises:
        ConfigError: it is unknown, is no Tracker, or needs a package that is not installed.
    """
    found = load(name, TRACKERS, key="trackers.names")
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        raise ConfigError(
            [FieldError("trackers.names", f"{name!r} is {found!r}, not a subclass of hybridflow.trackers.base.Tracker")]
        )
    return found


def run_folder(config: Config) -> Path:
    """The run's folder, created where it does not exist."""
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_name(config: Config) -> str:
    """What trackers call the run."""
    return config.trackers.run_name or Path(config.run.folder).absolute().name
