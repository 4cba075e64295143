"""How the roles with a model cut it over their ranks. Known before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hybridflow.parallel.layout import Layout

if TYPE_CHECKING:
    from hybridflow.config.schema import Config


def training_layout(config: Config, num_ranks: int) -> Layout:
    """Rows are cut over the data axis, the tokens of a row over `model.sequence_parallel` ranks, which divides `num_ranks`."""
    sequence = config.model.sequence_parallel
    assert num_ranks % sequence == 0, f"{num_ranks} ranks do not divide into groups of {sequence}; config/rules checks this"
    return Layout(data=num_ranks // sequence, sequence=sequence)
