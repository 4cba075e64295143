"""The quickstart by every algorithm, from one fine-tuned model, and a picture of how each of them learns.

    python -m examples.quickstart.curves --folder outputs/curves --picture docs/algorithms.png

Runs that are complete in the folder are not run again. One takes about a minute and a half on two idle cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from examples.quickstart.run import Folders, accuracies, algorithms, prepare, train_command

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 5


def measured(folder: Path, names: Sequence[str], *, seed: int = 0) -> dict[str, dict[int, float]]:
    """Algorithm -> step -> accuracy on held-out problems, after running what is missing."""
    folders = Folders(folder)
    if not folders.start.is_dir():
        prepare(folders, seed=seed)
    found = {}
    for name in names:
        run_folder = folder / "runs" / name
        if not any((run_folder / "checkpoints").glob("step_*")):  # written after the last step
            train_command(folders, name, run_folder, seed=seed)
        found[name] = accuracies(run_folder)
    return found


def draw(curves: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """A small diagram for each algorithm, all of the same scale."""
    from matplotlib.figure import Figure

    num_rows = -(-len(curves) // COLUMNS)
    figure = Figure(figsize=(2.5 * COLUMNS, 2.0 * num_rows + 0.5), layout="constrained")
    figure.suptitle("Right answers to held-out problems of the quickstart, over 100 steps")
    grid = figure.subplots(num_rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for axes, (name, curve) in zip(grid.flat, curves.items(), strict=False):
        _draw_one(axes, name, curve)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=80)


def _draw_one(axes: Axes, name: str, curve: Mapping[int, float]) -> None:
    steps = sorted(curve)
    values = [curve[step] for step in steps]
    axes.plot(steps, values, marker="o", markersize=3)
    axes.set_title(f"{name}: {values[0]:.2f} to {values[-1]:.2f}", fontsize=8)
    axes.set_ylim(0, 1)
    axes.grid(visible=True, color="0.9")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, run and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/curves"))
    parser.add_argument("--picture", type=Path, default=Path("docs/algorithms.png"))
    parser.add_argument("--algorithms", nargs="*", default=algorithms(), help="by default all that generate their rows")
    options = parser.parse_args(arguments)
    draw(measured(options.folder, options.algorithms), options.picture)


if __name__ == "__main__":
    main()
