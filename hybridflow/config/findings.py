"""Two kinds of mistakes that do not always stop a run."""

from __future__ import annotations

import os
from dataclasses import dataclass

from hybridflow.config.schema import Config
from hybridflow.errors import FieldError


@dataclass(frozen=True)
class Missing(FieldError):  # noqa: N818
    """What this machine lacks, and the one that is to run may have: a file, a package, a GPU. A warning in a dry run."""


@dataclass(frozen=True)
class FieldWarning(FieldError):  # noqa: N818
    """What a user should know, and what stops nothing: always a warning."""


def joins_a_cluster(config: Config) -> bool:
    """Whether ranks run where a cluster has room for them, and not on this machine necessarily."""
    return config.run.ray_address is not None or bool(os.environ.get("RAY_ADDRESS"))
