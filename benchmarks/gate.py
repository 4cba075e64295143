"""Fails where a workload has lost 5 % against a fixed version since it was last recorded.

    python -m benchmarks.ppo_step W1 --against 23c9331 --out /tmp/new
    python -m benchmarks.gate /tmp/new/ppo_step_W1_against_23c9331.json [--record]

Seconds depend on the host; the ratio to another version, measured in turns on one host, hardly does. Ratios are kept in
benchmarks/results/ratios.jsonl, one line per measurement; the last one of the same workload, version and device counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

RECORDED = Path(__file__).parent / "results" / "ratios.jsonl"
MOST_LOST = 0.05
STEP = "seconds/step"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Our seconds per step over those of another version."""

    workload: str
    against: str
    device: str
    commit: str
    date: str
    step: float

    @property
    def of(self) -> tuple[str, str, str]:
        """What is compared: measurements with the same answer are."""
        return self.workload, self.against, self.device


def read_result(content: Mapping[str, object]) -> Ratio:
    """The ratio in what `ppo_step --against` has written.

    Raises:
        SystemExit: it was written without --against.
    """
    found = content.get("ratios")
    if not isinstance(found, Mapping) or STEP not in found:
        raise SystemExit("the result holds no ratios: measure with python -m benchmarks.ppo_step WORKLOAD --against COMMIT")
    names = {name: str(content[name]) for name in ("workload", "against", "device", "commit", "date")}
    return Ratio(**names, step=float(found[STEP]))


def read_recorded(path: Path) -> list[Ratio]:
    """All that were recorded, the oldest first."""
    return [Ratio(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def verdict(new: Ratio, recorded: list[Ratio]) -> tuple[bool, str]:
    """Whether nothing is lost, and the words that say so."""
    before = [old for old in recorded if old.of == new.of]
    said = f"{new.workload} takes {new.step:.3f} of the step of {new.against} on {new.device}"
    if not before:
        return True, f"{said}; no such measurement was recorded yet"
    last = before[-1]
    change = new.step / last.step - 1
    return change <= MOST_LOST, f"{said}; recorded was {last.step:.3f} ({last.commit}, {last.date}): {change:+.1%}"


def main() -> None:
    """Compare the results that are named; ends with 1 where one has lost too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--record", action="store_true", help="keep what has not lost too much as what counts from now on")
    parser.add_argument("--recorded", type=Path, default=RECORDED)
    options = parser.parse_args()
    recorded, is_good = read_recorded(options.recorded), True
    for path in options.results:
        new = read_result(json.loads(path.read_text()))
        passes, words = verdict(new, recorded)
        Console(soft_wrap=True).print(("ok: " if passes else "LOST: ") + words, markup=False, highlight=False)
        is_good &= passes
        if options.record and passes:
            with options.recorded.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(new)) + "\n")
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
