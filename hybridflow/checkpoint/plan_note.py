"""What a run's plan has decided, kept in its folder: who goes on there computes as before, whatever memory is free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from hybridflow.disk import write_durably
from hybridflow.planner.decisions import Decisions

FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class PlanNote:
    """What plan.json says; empty where there is none."""

    is_compiled: bool | None = None
    pools: Mapping[str, Decisions] = field(default_factory=dict)
    """What was decided, by what it was decided for: `planner.search.fingerprint`."""

    def write(self, folder: Path) -> None:
        """Replace what `folder` has."""
        pools = {key: {**asdict(made), "options": sorted(made.options)} for key, made in self.pools.items()}
        write_durably(folder / FILE, json.dumps({"is_compiled": self.is_compiled, "pools": pools}, indent=1))


def read_note(folder: Path) -> PlanNote:
    """The note of the run in `folder`. One that another release wrote, or that is damaged, counts nothing."""
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
        pools = {key: Decisions(**made) for key, made in content["pools"].items()}
        pools = {key: replace(made, options=frozenset(made.options)) for key, made in pools.items()}
        return PlanNote(is_compiled=content["is_compiled"], pools=pools)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return PlanNote()
