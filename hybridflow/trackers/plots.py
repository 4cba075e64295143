"""Plots of a run, from its metrics.jsonl alone: whether it learns, whether it is healthy, and where the time goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hybridflow.errors import DataError
from hybridflow.trackers.jsonl import read_lines
from hybridflow.trackers.own import own_metrics
from hybridflow.trackers.timeline import drawn_timeline, read_spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOT_PHASES_OF_A_STEP = {"seconds/step", "seconds/validation", "seconds/checkpoint"}
COLORS = tuple(f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive"))
MAX_PHASES = 7
"""Phases with a colour of their own; the shorter ones are drawn together."""
SMOOTHED_FROM_STEPS = 40
"""Runs of at least this many steps get a running mean over their raw values."""


LARGEST_DRAWN = 1e300
"""Beyond, an axis overflows; of a run that has diverged so far it is enough to see where the curve ends."""


@dataclass(frozen=True)
class ReadRun:
    """The numbers of a run."""

    name: str
    lines: list[dict[str, object]]
    """One per step, as in metrics.jsonl."""

    @property
    def window(self) -> int:
        """Steps whose mean is drawn; 1 where the run is short enough to see every step."""
        return 1 if len(self.lines) < SMOOTHED_FROM_STEPS else max(5, len(self.lines) // 20)

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was measured and is a number."""
        points = [(line["step"], line[metric]) for line in self.lines if metric in line]
        numbers = [
            (int(step), float(value))
            for step, value in points
            if isinstance(step, int) and isinstance(value, int | float) and abs(value) < LARGEST_DRAWN
        ]
        return [step for step, _ in numbers], [value for _, value in numbers]

    def names(self, prefix: str) -> list[str]:
        """The metrics that begin with `prefix`, in the order of their first appearance."""
        found = {name: None for line in self.lines for name in line if name.startswith(prefix)}
        return [name for name in found if self.series(name)[0]]


@dataclass(frozen=True)
class Line:
    """One metric over the steps."""

    metric: str
    label: str
    color: str
    with_ends: bool = False
    """Say the first and the last value in the legend, and mark every point."""


def lines_of(labels: Mapping[str, str], *, with_ends: bool = False) -> tuple[Line, ...]:
    """A line for each metric with its label, in different colors."""
    colored = zip(labels.items(), cycle(COLORS), strict=False)
    return tuple(Line(metric, label, color, with_ends) for (metric, label), color in colored)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One diagram of a figure. It is left out where none of its metrics were measured."""

    title: str
    unit: str
    """Of the vertical axis."""
    lines: tuple[Line, ...] = ()
    axis: Literal["fitted", "from zero", "logarithmic"] = "fitted"
    lowest: float = -math.inf
    """Values below are cut off: how far below says nothing, and would flatten the rest."""
    phases: bool = False
    """Draw the seconds of all phases on top of each other, behind the lines."""


def plot_run(folder: str | Path) -> list[Path]:
    """Draw `plots/learning.png`, `plots/health.png`, `plots/speed.png` and `plots/own_metrics.png` in the run's folder; returns
    their paths.

    A figure of which nothing was measured is left out.

    Raises:
        DataError: the folder has no metrics.jsonl, or no step in it.
    """
    run = read_run(Path(folder))
    target = Path(folder) / "plots"
    target.mkdir(exist_ok=True)
    paths = []
    for name, panels in figures(run).items():
        if measured := [panel for panel in panels if _is_measured(panel, run)]:
            paths.append(target / f"{name}.png")
            drawn(run, measured, f"{run.name}: {name}").savefig(paths[-1], dpi=110)
    recorded = Path(folder) / "timeline.json"
    if spans := read_spans(recorded) if recorded.is_file() else []:
        paths.append(target / "timeline.png")
        drawn_timeline(spans, run.name).savefig(paths[-1], dpi=110)
    return paths


def read_run(folder: Path) -> ReadRun:
    """The metrics of the run in `folder`.

    Raises:
        DataError: there are none.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give the folder of a run, which is `run.folder` of its configuration")
    lines = read_lines(path)
    if not lines:
        raise DataError(f"{path} has no finished step yet. Try again after the first step")
    return ReadRun(folder.absolute().name, lines)


def figures(run: ReadRun) -> dict[str, tuple[Panel, ...]]:
    """File name -> its panels, in reading order. The run says which metrics of the user's own there are."""
    return {"learning": _learning(run), "health": HEALTH, "speed": SPEED, "own_metrics": _own(run)}


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to `window - 1` values before it."""
    return [sum(part) / len(part) for part in (values[max(0, end - window) : end] for end in range(1, len(values) + 1))]


def _learning(run: ReadRun) -> tuple[Panel, ...]:
    training, validation = _scores(run, "reward/"), _scores(run, "validation/reward/")
    colors = dict(zip(dict.fromkeys([*training.values(), *validation.values()]), cycle(COLORS), strict=False))
    training_lines = [Line(name, score, colors[score]) for name, score in training.items()]
    validation_lines = [Line(name, score, colors[score], with_ends=True) for name, score in validation.items()]
    return (
        Panel(title="Training: the step's responses", unit="mean over responses", lines=tuple(training_lines)),
        Panel(title="Validation: held-out prompts", unit="mean over responses", lines=tuple(validation_lines)),
        *_quality(run),
    )


def _own(run: ReadRun) -> tuple[Panel, ...]:
    """A panel for each first word of the metrics that are the run's own: what its rewards, roles or algorithm have reported."""
    drawn_elsewhere = {line.metric for panel in (*_learning(run), *HEALTH, *SPEED) for line in panel.lines}
    words: dict[str, list[str]] = {}
    for name in own_metrics(run.names("")):
        if "/" in name and name not in drawn_elsewhere:
            words.setdefault(name.partition("/")[0], []).append(name)
    labels = {word: {name: name.partition("/")[2].replace("_", " ") for name in names} for word, names in words.items()}
    return tuple(Panel(title=word.replace("_", " "), unit="as reported", lines=lines_of(own)) for word, own in labels.items())


def _quality(run: ReadRun) -> tuple[Panel, ...]:
    """Of validation, what answers are worth; of rows that are held out, what the algorithm measures."""
    measures = ("accuracy", "pass", "majority")
    found = [name for name in run.names("validation/") if name.rpartition("/")[2].partition("@")[0] in measures]
    worth = [name for name in found if not name.startswith("validation/reward/")]
    beside = [run.series(name) for name in _scores(run, "validation/reward/")]
    if all(run.series(name) in beside for name in worth):  # one response to each prompt: the panel beside has it all
        worth = []
    answers = {name: name.removeprefix("validation/") for name in worth}
    held_out = {name: name.removeprefix("held_out/") for name in run.names("held_out/")}
    panels = (
        Panel(title="Validation: what answers are worth", unit="share", lines=lines_of(answers, with_ends=True)),
        Panel(title="Held-out rows", unit="as measured", lines=lines_of(held_out, with_ends=True)),
    )
    return tuple(panel for panel in panels if panel.lines)


def _scores(run: ReadRun, prefix: str) -> dict[str, str]:
    """Metric -> what people call it."""
    return {name: _score(name) for name in run.names(prefix) if not name.endswith(("/std", "/failed"))}


def _score(metric: str) -> str:
    """What people call `reward/mean`, `reward/accuracy`, and the same in a validation."""
    name = metric.rpartition("reward/")[2]
    return "reward" if name == "mean" else name.replace("_", " ")


def merged(lines: Sequence[Line], run: ReadRun) -> list[Line]:
    """The lines that were measured; those that would lie on each other are one, with the names of all."""
    found: dict[tuple[tuple[int, float], ...], Line] = {}
    for line in lines:
        if points := tuple(zip(*run.series(line.metric), strict=True)):
            above = found.get(points)
            found[points] = replace(above, label=f"{above.label} = {line.label}") if above else line
    return list(found.values())


def _is_measured(panel: Panel, run: ReadRun) -> bool:
    return any(run.series(line.metric)[0] for line in panel.lines)


def drawn(run: ReadRun, panels: Sequence[Panel], title: str) -> Figure:
    """The panels in rows of two; of an odd number, the first has a row of its own."""
    from matplotlib.figure import Figure

    num_rows = (len(panels) + 1) // 2
    # Not pyplot: it keeps global state and asks for a display.
    figure = Figure(figsize=(6.4 * min(2, len(panels)), 4.1 * num_rows + 0.6), layout="constrained")
    smoothing = "" if run.window == 1 else f"   (thin: each step, bold: mean of the last {run.window} steps)"
    figure.suptitle(f"{title}{smoothing}", fontsize=12)
    grid = figure.add_gridspec(num_rows, 2)
    num_wide = len(panels) % 2
    for index, panel in enumerate(panels):
        row, column = divmod(index + num_wide, 2)
        is_wide = index < num_wide
        _draw_panel(figure.add_subplot(grid[0, :] if is_wide else grid[row, column]), panel, run)
    return figure


def _draw_panel(axes: Axes, panel: Panel, run: ReadRun) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.grid(visible=True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    if panel.phases:
        _draw_phases(axes, run)
    for line in merged(panel.lines, run):
        _draw_line(axes, line, run)
    if panel.axis == "logarithmic" and any(value > 0 for line in panel.lines for value in run.series(line.metric)[1]):
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if panel.axis == "from zero":
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    if panel.phases:
        _cut_first_step(axes, run)
    if axes.get_ylim()[0] < panel.lowest:
        axes.set_ylim(bottom=panel.lowest)
    # Below the diagram: inside, it would cover the curves of some runs. Where the legend is wider, all diagrams become narrow:
    # some 80 characters fit, and a line takes 8 beside its label.
    longest = max((len(str(label)) for label in axes.get_legend_handles_labels()[1]), default=0)
    columns = min(3, max(1, 80 // (longest + 8)))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, frameon=False, fontsize=9)


def _draw_line(axes: Axes, line: Line, run: ReadRun) -> None:
    """The metric; in long runs its running mean, with the raw values thin behind."""
    steps, values = run.series(line.metric)
    if line.with_ends:
        ends = f"{line.label}: {values[0]:.3g} → {values[-1]:.3g}"
        axes.plot(steps, values, color=line.color, label=ends, linewidth=1.8, marker="o", markersize=4)
        return
    if run.window > 1:
        axes.plot(steps, values, color=line.color, alpha=0.3, linewidth=0.8)
        values = running_mean(values, run.window)
    marker = "o" if run.window == 1 or len(steps) == 1 else None
    axes.plot(steps, values, color=line.color, label=line.label, linewidth=1.8, marker=marker, markersize=3)


def _draw_phases(axes: Axes, run: ReadRun) -> None:
    """The longest phase at the bottom; phases that overlap in time add up to more than the step."""
    lines = [line for line in run.lines if "seconds/step" in line]
    columns = {
        name: [_number(line.get(name)) for line in lines] for name in run.names("seconds/") if name not in NOT_PHASES_OF_A_STEP
    }
    longest = sorted(columns, key=lambda name: -sum(columns[name]))
    stack = {name.removeprefix("seconds/"): columns[name] for name in longest[:MAX_PHASES]}
    if rest := longest[MAX_PHASES:]:
        stack[f"{len(rest)} shorter phases"] = [sum(parts) for parts in zip(*(columns[name] for name in rest), strict=True)]
    steps = [_number(line["step"]) for line in lines]
    bottom = [0.0] * len(lines)
    for label, values in stack.items():
        axes.bar(steps, values, bottom=bottom, width=1.0, label=label, alpha=0.75)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]


def _cut_first_step(axes: Axes, run: ReadRun) -> None:
    """Let a first step that compiles kernels leave the diagram at the top, and say how long it took."""
    steps, seconds = run.series("seconds/step")
    longest = max(seconds[1:], default=math.inf)
    if seconds and seconds[0] > 2 * longest:
        axes.set_ylim(top=1.5 * longest)
        axes.annotate(f" {seconds[0]:.3g} s", (steps[0], 1.5 * longest), va="top", fontsize=9)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


HEALTH = (
    Panel(
        title="How far the policy has moved",
        unit="KL divergence, nats per token",
        lines=lines_of(
            {
                "kl/mean": "from the reference",
                "actor/kl_to_reference": "from the reference, in the loss",
                "actor/approx_kl": "within the step",
            }
        ),
    ),
    Panel(title="Entropy of the policy", unit="nats per token", lines=lines_of({"actor/entropy": "entropy"})),
    Panel(title="Loss of the actor", unit="loss", lines=lines_of({"actor/loss": "actor"})),
    Panel(title="Loss of the critic", unit="half the squared error", lines=(Line("critic/loss", "critic", "tab:orange"),)),
    Panel(
        title="Clipped by the loss",
        unit="share of tokens",
        axis="from zero",
        lines=lines_of(
            {
                "actor/clip_fraction_upper": "ratio above",
                "critic/clip_fraction": "value",
                "actor/clip_fraction_lower": "ratio below",
            }
        ),
    ),
    Panel(
        title="Gradients before clipping",
        unit="L2 norm",
        axis="logarithmic",
        lines=lines_of({"actor/grad_norm": "actor", "critic/grad_norm": "critic"}),
    ),
    Panel(
        title="What the critic knows",
        unit="share of the returns' variance",
        lowest=-1.0,
        lines=(Line("critic/explained_variance", "explained variance (1 is all of it, below -1 is cut off)", "tab:orange"),),
    ),
    Panel(
        title="Lengths",
        unit="tokens",
        axis="from zero",
        lines=lines_of(
            {
                "response/tokens_mean": "response, mean",
                "response/tokens_max": "response, longest",
                "prompt/tokens_mean": "prompt, mean",
            }
        ),
    ),
    Panel(
        title="Engine against trainer",
        unit="|difference of log-probabilities|, nats",
        axis="logarithmic",
        lines=lines_of({"mismatch/mean": "mean", "mismatch/p99": "99th percentile", "mismatch/max": "largest"}),
    ),
)

SPEED = (
    Panel(
        title="Where a step's time goes",
        unit="seconds",
        axis="from zero",
        phases=True,
        lines=(Line("seconds/step", "whole step", "black"),),
    ),
    Panel(
        title="Throughput",
        unit="prompt and response tokens per second",
        axis="from zero",
        lines=lines_of({"tokens_per_second": "tokens per second"}),
    ),
    Panel(
        title="Model FLOPs utilisation in training",
        unit="share of the GPU's peak",
        axis="from zero",
        lines=lines_of({"actor/mfu": "actor", "critic/mfu": "critic"}),
    ),
    Panel(
        title="GPU memory of the fullest rank, most so far",
        unit="GiB",
        axis="from zero",
        lines=lines_of({"memory/peak_reserved_gib": "peak reserved", "memory/peak_allocated_gib": "peak allocated"}),
    ),
    Panel(
        title="What the controller costs",
        unit="milliseconds per step",
        axis="from zero",
        lines=lines_of({"controller/milliseconds_per_step": "its own work"}),
    ),
)
