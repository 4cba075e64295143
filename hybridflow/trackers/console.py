"""The console: one line per step, and on a terminal a progress bar under them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hybridflow.config.schema import Config
from hybridflow.metrics import Metrics
from hybridflow.trackers.base import Sample, Tracker
from hybridflow.trackers.own import own_metrics


@dataclass(frozen=True)
class Number:
    """A metric as a line shows it, where it was measured."""

    label: str
    names: tuple[str, ...]
    """Of which the first present is taken."""
    form: str
    lowest: float = -math.inf
    """What is below shows as less than this: how much less says nothing."""
    shows_zero: bool = True

    def texts(self, metrics: Metrics) -> list[str]:
        """Label and value; empty where there is nothing to show."""
        value = next((metrics[name] for name in self.names if name in metrics), math.nan)
        if math.isnan(value) or (value == 0 and not self.shows_zero):
            return []
        return [f"{self.label} <{self.lowest:g}" if value < self.lowest else f"{self.label} {value:{self.form}}"]


REWARD = Number("reward", ("reward/mean",), ".3f")
SHOWN = (
    Number("rewards failed", ("reward/failed",), ".0f", shows_zero=False),
    Number("kl", ("kl/mean", "actor/kl_to_reference"), ".2g"),
    Number("entropy", ("actor/entropy",), ".3g"),
    Number("loss", ("actor/loss",), ".2g"),
    Number("tokens", ("response/tokens_mean",), ".0f"),
    Number("turns", ("environment/turns",), ".2g"),
    Number("cut off", ("response/truncated",), ".0%", shows_zero=False),
    Number("grad", ("actor/grad_norm",), ".2g"),
    Number("explained", ("critic/explained_variance",), ".2f", lowest=-10),
    Number("clipped", ("actor/clip_fraction",), ".1%"),
    Number("mismatch", ("mismatch/mean",), ".1e"),
    Number("critic loss", ("critic/loss",), ".3g"),
)
"""What a step's line shows after the rewards, the most important first."""
SPEED = (
    Number("tokens/s", ("tokens_per_second",), ",.0f"),
    Number("mfu", ("actor/mfu",), ".1%"),
    Number("peak GiB", ("memory/peak_allocated_gib",), ".1f"),
)

OWN_REWARD_METRICS = {"reward/mean", "reward/std", "reward/failed"}
NOT_PHASES = {"seconds/step", "seconds/validation"}
"""The whole, a part of another phase, and what has a line of its own."""
MAX_SAMPLES = 3
MAX_USER_METRICS = 3
MAX_OWN_METRICS = 4
"""Of the algorithm, its loss and its roles: those that come first."""
SMALLEST_SHARE_SHOWN = 0.05
"""Phases that take less of a step are left out of its line."""
MAX_CHARACTERS = 160
"""Of a step's line. metrics.jsonl has everything."""


class ConsoleTracker(Tracker):
    """Lines for people. Without a terminal there is no bar, and each line says how long the rest will take."""

    def __init__(self, config: Config, total_steps: int, resume_step: int):
        super().__init__(config, total_steps, resume_step)
        # Wide where there is no terminal: a line of a log file is one line, whatever reads it.
        self.console = Console(soft_wrap=True, highlight=False)
        self.started = time.monotonic()
        self.bar = self._bar() if self.console.is_terminal else None

    @classmethod
    def check(cls, config: Config) -> None:
        """Nothing can fail, and a trial would show a bar."""

    def log(self, step: int, metrics: Metrics) -> None:
        if step > 0:
            head, end = f"step {step}/{self.total_steps}  ", self._remaining(step)
            line = step_line(metrics, max_characters=MAX_CHARACTERS - len(head) - len(end))
            self._print(Text.assemble((head, "bold"), line, end))
        else:
            self.started = time.monotonic()  # the validation before training is no step
        if validation := validation_line(metrics):
            self._print(Text.assemble((f"validation at step {step}", "bold cyan"), f"  {validation}"))
        if held_out := held_out_line(metrics):
            self._print(Text.assemble((f"held-out rows at step {step}", "bold cyan"), f"  {held_out}"))
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
        done = (TextColumn("steps"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(*done, TextColumn("left"), TimeRemainingColumn(), console=self.console)
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


def step_line(metrics: Metrics, *, max_characters: int) -> str:
    """What training measured in a step, the seconds of its phases, and its speed: of all that, the most important that fits."""
    rewards, own, phases, speed = _rewards(metrics), _own(metrics), _phases(metrics), _speed(metrics)
    measured = [*rewards, *own, *_texts(SHOWN, metrics)]
    sections = (measured, phases, speed)
    num_first = max(5, len(rewards) + len(own))
    kept: set[str] = set()
    for text in (*measured[:num_first], *speed[:2], *phases[:2], *measured[num_first:], *phases[2:], *speed[2:]):
        if len(_joined(sections, kept | {text})) <= max_characters:
            kept.add(text)
    return _joined(sections, kept)


def validation_line(metrics: Metrics) -> str:
    """What validation measured, or an empty string where there was none."""
    scores = Metrics({name.partition("/")[2]: value for name, value in metrics.items() if name.startswith("validation/")})
    took = [f"took {_seconds(metrics['seconds/validation'])}"] if "seconds/validation" in metrics else []
    of_environment = Metrics({name: value for name, value in scores.items() if name.startswith("environment/")})
    texts = [*_rewards(scores), *_own(of_environment), *_texts(SHOWN, scores)]
    return "  ".join([*texts, *took]) if texts else ""


def held_out_line(metrics: Metrics) -> str:
    """What the algorithm measured of held-out rows, or an empty string where there were none."""
    names = [name for name in metrics if name.startswith("held_out/")]
    return "  ".join(_texts([Number(name.partition("/")[2].replace("_", " "), (name,), ".3g") for name in names], metrics))


def shortened(text: str, *, keep_end: bool, max_characters: int = 300) -> str:
    """`text` on one line, with ... for what is left out at the beginning or at the end."""
    line = text.replace("\n", "\\n")
    if len(line) <= max_characters:
        return line
    return f"...{line[-max_characters:]}" if keep_end else f"{line[:max_characters]}..."


def _joined(sections: Sequence[Sequence[str]], kept: Collection[str]) -> str:
    lines = ("  ".join(text for text in section if text in kept) for section in sections)
    return " | ".join(line for line in lines if line)


def _texts(numbers: Sequence[Number], metrics: Metrics) -> list[str]:
    return [text for number in numbers for text in number.texts(metrics)]


def _rewards(metrics: Metrics) -> list[str]:
    """The reward and what the user's function measured; of those that show the same value, the first."""
    own = [name for name in metrics if name.startswith("reward/") and name not in OWN_REWARD_METRICS]
    numbers = [REWARD, *(Number(name.removeprefix("reward/"), (name,), REWARD.form) for name in own)]
    texts = {text.rpartition(" ")[2]: text for text in reversed(_texts(numbers, metrics))}
    return list(reversed(texts.values()))[: 1 + MAX_USER_METRICS]


def _own(metrics: Metrics) -> list[str]:
    """What the algorithm measured in the step beyond what all do; held-out rows have a line of their own."""
    names = own_metrics(name for name in metrics if not name.startswith("held_out/"))[:MAX_OWN_METRICS]
    return _texts([Number(name.rpartition("/")[2].replace("_", " "), (name,), ".3g") for name in names], metrics)


def _phases(metrics: Metrics) -> list[str]:
    """The longest first."""
    whole = metrics.get("seconds/step", 0.0)
    seconds = {name: value for name, value in metrics.items() if name.startswith("seconds/") and name not in NOT_PHASES}
    longest = sorted(seconds, key=lambda name: -seconds[name])
    return [
        f"{name.removeprefix('seconds/').removesuffix('_part')} {_seconds(seconds[name])}"
        for name in longest
        if seconds[name] >= SMALLEST_SHARE_SHOWN * whole
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f}s" if value < 1 else f"{value:.1f}s" if value < 100 else f"{value:.0f}s"


def _speed(metrics: Metrics) -> list[str]:
    step = [f"step {_seconds(metrics['seconds/step'])}"] if "seconds/step" in metrics else []
    return [*step, *_texts(SPEED, metrics)]
