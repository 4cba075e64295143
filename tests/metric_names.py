"""Which names of metrics docs/metrics.md explains."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
OF_THE_LINE = ("step", "time")
"""Keys of a line of metrics.jsonl that are no metrics."""
FOLDED = ("importance/weight_sq", "stream/engine_seconds")
"""Reported by ranks; a step's line has `importance/effective_sample_size` and `stream/idle_generation` in their place."""
UNDER_OTHERS = ("validation/", "held_out/")
"""What stands before names of other tables where their metrics are of held-out rows."""


def explained(page: str) -> list[re.Pattern[str]]:
    """One pattern for each name in the first column of the page's tables. `<name>` and `NAME` stand for any name, `...` for
    any ending, and `_gather` after `sync/seconds_load` for `sync/seconds_gather`."""
    patterns = []
    for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE):
        before = ""
        for written in re.findall(r"`([^`]+)`", row):
            name = f"{before.rpartition('_')[0]}{written}" if written.startswith("_") else written
            before = name
            literal = re.escape(name).replace(r"\.\.\.", ".*")
            patterns.append(re.compile(re.sub(r"<\w+>|NAME", ".+", literal)))
        if re.search(r"`, \.\.\.", row):
            patterns.append(re.compile(re.escape(before.rpartition("_")[0]) + r"_\d+"))
    return patterns


def unexplained(names: Iterable[str]) -> list[str]:
    """Those that the page does not explain."""
    patterns = explained(PAGE.read_text(encoding="utf-8"))
    return sorted(name for name in {*names} - {*OF_THE_LINE, *FOLDED} if not _is_explained(name, patterns))


def _is_explained(name: str, patterns: list[re.Pattern[str]]) -> bool:
    rest = next((name.removeprefix(prefix) for prefix in UNDER_OTHERS if name.startswith(prefix)), name)
    return any(pattern.fullmatch(form) for pattern in patterns for form in (name, rest))
