"""The console: one line per step, and on a terminal a progress bar under them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hybridflow.config.schema import Config
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker

SHOWN: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("reward", ("reward/mean",), ".3f"),
    ("kl", ("kl/mean", "actor/kl_to_reference"), ".2g"),
    ("entropy", ("actor/entropy",), ".3g"),
    ("loss", ("actor/loss",), ".3g"),
    ("clipped", ("actor/clip_fraction",), ".1%"),
    ("grad", ("actor/grad_norm",), ".2g"),
    ("critic loss", ("critic/loss",), ".3g"),
    ("explained", ("critic/explained_variance",), ".2f"),
    ("tokens", ("response/tokens_mean",), ".0f"),
    ("cut off", ("response/truncated",), ".0%"),
    ("engine gap", ("agreement/mean",), ".1e"),
)
"""What a step's line shows where it was measured: label, names of which the first present is taken, format."""

OWN_REWARD_METRICS = {"reward/mean", "reward/std", "reward/failed"}
MAX_SAMPLES = 3
SMALLEST_SHARE_SHOWN = 0.02
"""Phases that take less of a step are left out of its line."""


class ConsoleTracker(Tracker):
    """Lines for people. Without a terminal there is no bar, and each line says how long the rest will take."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        # Wide where there is no terminal: a line of a log file is one line, whatever reads it.
        self.console = Console(soft_wrap=True, highlight=False)
        self.started = time.monotonic()
        self.bar = self._bar() if self.console.is_terminal else None

    def log(self, step: int, metrics: Metrics) -> None:
        if step > 0:
            self._print(
                Text.assemble((f"step {step}/{self.total_steps}", "bold"), f"  {step_line(metrics)}", self._remaining(step))
            )
        if validation := validation_line(metrics):
            self._print(Text.assemble((f"validation at step {step}", "bold cyan"), f"  {validation}"))
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        for sample in samples[:MAX_SAMPLES]:
            answer = f", expected {sample.ground_truth!r}" if sample.ground_truth else ""
            self._print(Text.assemble((f"sample at step {step}", "bold cyan"), f"  reward {sample.reward:g}{answer}"))
            self._print(Text.assemble(("  prompt    ", "dim"), shortened(sample.prompt, keep_end=True)))
            self._print(Text.assemble(("  response  ", "dim"), shortened(sample.response, keep_end=False)))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _print(self, line: Text) -> None:
        self.console.print(line)

    def _bar(self) -> Progress:
        columns = (
            TextColumn("steps"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        bar = Progress(*columns, console=self.console)
        bar.add_task("steps", total=self.total_steps, completed=self.resume_step)
        bar.start()
        return bar

    def _remaining(self, step: int) -> str:
        """How long the rest takes at this run's mean pace; on a terminal the bar says it."""
        done = step - self.resume_step
        if self.bar is not None or done <= 0:
            return ""
        seconds = (time.monotonic() - self.started) / done * (self.total_steps - step)
        return f"  {timedelta(seconds=round(seconds))} left"


def step_line(metrics: Metrics) -> str:
    """What training measured in a step, the seconds of its phases, and its speed."""
    parts = ["  ".join(_shown(metrics)), "  ".join(_phases(metrics)), "  ".join(_speed(metrics))]
    return " | ".join(part for part in parts if part)


def validation_line(metrics: Metrics) -> str:
    """What validation measured, or an empty string where there was none."""
    measured = {name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("validation/")}
    scores = Metrics({name: value for name, value in measured.items() if not math.isnan(value)})
    return "  ".join(_shown(scores))


def shortened(text: str, *, keep_end: bool, max_characters: int = 300) -> str:
    """`text` on one line, with ... for what is left out at the beginning or at the end."""
    line = text.replace("\n", "\\n")
    if len(line) <= max_characters:
        return line
    return f"...{line[-max_characters:]}" if keep_end else f"{line[:max_characters]}..."


def _shown(metrics: Metrics) -> Iterator[str]:
    for label, names, form in SHOWN:
        value = next((metrics[name] for name in names if name in metrics), math.nan)
        if not math.isnan(value):
            yield f"{label} {value:{form}}"
        if label == "reward":
            yield from _user_rewards(metrics)


def _user_rewards(metrics: Metrics) -> Iterator[str]:
    for name, value in metrics.items():
        if name.startswith("reward/") and name not in OWN_REWARD_METRICS and not math.isnan(value):
            yield f"{name.removeprefix('reward/')} {value:.3f}"
    if failed := metrics.get("reward/failed", 0.0):
        yield f"rewards failed {failed:.0f}"


def _phases(metrics: Metrics) -> Iterator[str]:
    whole = metrics.get("seconds/step", 0.0)
    for name, value in metrics.items():
        if name.startswith("seconds/") and name != "seconds/step" and value >= SMALLEST_SHARE_SHOWN * whole:
            yield (
                f"{name.removeprefix('seconds/')} {value:.2g}s"
                if value < 10
                else f"{name.removeprefix('seconds/')} {value:.0f}s"
            )
    if whole:
        yield f"step {whole:.1f}s"


def _speed(metrics: Metrics) -> Iterator[str]:
    forms: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("tokens_per_second", lambda value: f"{value:,.0f} tok/s"),
        ("actor/mfu", lambda value: f"mfu {value:.1%}"),
        ("memory/peak_allocated_gib", lambda value: f"{value:.1f} GiB"),
    )
    for name, form in forms:
        if name in metrics and not math.isnan(metrics[name]):
            yield form(metrics[name])
