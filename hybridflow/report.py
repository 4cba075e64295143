"""Plot a run: `python -m hybridflow.report RUN_FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

from hybridflow.ending import as_process, ended_command, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots of each run's metrics.jsonl and say where they are; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridflow.report", description="Plot runs from their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="`run.folder` of a run, finished or going on")
    options = parser.parse_args(arguments)
    return ended_command("The report", partial(_plotted, options.runs))


def _plotted(runs: Sequence[str]) -> int:
    from hybridflow.trackers.plots import plot_run

    for run in runs:
        show("".join(f"{path}\n" for path in plot_run(run)))
    return 0


if __name__ == "__main__":
    as_process(main)
