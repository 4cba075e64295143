"""Draw how runs learned: the share of right answers, sampled in training and greedy on the test problems.

    python examples/smollm2_gsm8k/plot.py curves.png "GRPO=outputs/smollm2_gsm8k/grpo/metrics.jsonl" "PPO=..."

One line for each run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

AVERAGED = 10
"""Steps over which the sampled share is averaged: of one step it has a standard error of one or two points."""


def main() -> None:
    """Read each run's metrics, and draw two panels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", help="where the picture goes")
    parser.add_argument("runs", nargs="+", metavar="NAME=METRICS", help="metrics.jsonl of a run, with what to call it")
    options = parser.parse_args()
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = dict(zip(("reward/accuracy", "validation/reward/accuracy"), figure.subplots(1, 2), strict=True))
    for name, _, path in (run.partition("=") for run in options.runs):
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        for metric, axes in panels.items():
            points = [(line["step"], 100 * line[metric]) for line in lines if metric in line]
            if not metric.startswith("validation"):
                points = [mean(points[place : place + AVERAGED]) for place in range(0, len(points), AVERAGED)]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    for axes, title in zip(panels.values(), ("sampled in training", "greedy, all test problems"), strict=True):
        axes.set(title=title, xlabel="step", ylabel="right answers, %")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    next(iter(panels.values())).legend(fontsize="small")
    figure.savefig(options.picture, dpi=120)


def mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Of steps and of shares."""
    steps, shares = zip(*points, strict=True)
    return sum(steps) / len(steps), sum(shares) / len(shares)


if __name__ == "__main__":
    main()
