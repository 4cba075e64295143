"""Validation beside training, by engines of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.config.load import load_config
from hybridflow.errors import ConfigError
from hybridflow.trackers.timeline import read_spans
from tests.ray.runs import Toy, trained

BESIDE = (
    "validation.concurrent=true",
    "placement.pools={main: 1x1, held_out: 1x1, scoring: 1x1 cpu}",
    "placement.roles.validation=held_out",
    "placement.cpu_slots=3",
)


def scores(steps: list[dict[str, float]]) -> dict[float, float]:
    """Step -> what validation found for its weights."""
    return {line["step"]: line["validation/reward/mean"] for line in steps if "validation/reward/mean" in line}


@pytest.mark.slow
def test_validation_beside_training_finds_for_each_step_what_validation_in_between_finds(
    toy: Toy, cluster: None, tmp_path: Path
) -> None:
    validated = (f"data.validation_files=[{toy.data}]", "validation.every_steps=1", "run.total_steps=3")
    between = trained(toy, tmp_path / "between", *validated)
    beside = trained(toy, tmp_path / "beside", *validated, *BESIDE)
    assert scores(beside) == scores(between) and list(scores(beside)) == [1, 2, 3]
    spans = read_spans(next((tmp_path / "beside").rglob("timeline.json")))
    assert "held_out" in {span.pool for span in spans}


def test_engines_for_validation_share_their_pool_with_no_other_role(toy: Toy) -> None:
    overrides = ["validation.concurrent=true", f"data.validation_files=[{toy.data}]"]
    with pytest.raises(ConfigError, match=r"'validation' is on pool 'main', together with .*placement\.roles\.validation"):
        load_config(str(toy.config), overrides)
