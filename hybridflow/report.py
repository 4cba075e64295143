"""Plot a run: `python -m hybridflow.report RUN_FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hybridflow.errors import HybridflowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the plots of each run's metrics.jsonl and say where they are; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hybridflow.report", description="Plot runs from their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="`run.folder` of a run, finished or going on")
    options = parser.parse_args(arguments)
    from hybridflow.trackers.plots import plot_run

    try:
        for run in options.runs:
            sys.stdout.writelines(f"{path}\n" for path in plot_run(run))
    except HybridflowError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
