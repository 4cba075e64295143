"""The whole table on the quickstart, as `make curves` runs it: each algorithm by its name alone, from one fine-tuned model."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.quickstart.curves import draw, measured
from examples.quickstart.run import algorithms


@pytest.mark.slow
def test_every_algorithm_raises_the_accuracy_by_a_fifth(tmp_path: Path) -> None:
    curves = measured(tmp_path, algorithms())
    gains = {name: max(curve.values()) - curve[0] for name, curve in curves.items()}
    assert len(gains) >= 17 and min(gains.values()) >= 0.2, gains
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
