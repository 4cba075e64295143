"""What the plan needs to know of a rank: its GPU, and the sizes of the models that its roles will load."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from hybridflow.config.schema import Config
from hybridflow.planner.memory import Gpu
from hybridflow.planner.needs import model_paths
from hybridflow.planner.sizes import ModelSize


@dataclass(frozen=True)
class HardwareInfo:
    """Found on one rank."""

    gpu: Gpu
    sizes: dict[str, ModelSize]
    """By role."""
    num_training_rows: int | None = None
    """Of the training files; None where this machine cannot read them, or nobody needs it."""


def hardware_info(config: Config, roles: Set[str]) -> HardwareInfo:
    """The memory of this rank's GPU, which must exist, and the sizes of the models of `roles`; loads none of them.

    Raises:
        ModelError: a model cannot be found or trained.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    num_rows = num_training_rows(config) if roles and config.run.total_steps is None else None
    return HardwareInfo(Gpu(total=total, free=free), model_sizes(config, roles), num_rows)


def num_training_rows(config: Config) -> int | None:
    """Rows of all training files, before any is dropped; None where this machine cannot read them."""
    from hybridflow.data.parquet import num_rows

    try:
        return sum(num_rows(path) for path in config.data.train_files)
    except (OSError, ValueError):  # the data role, which may be elsewhere, says what is wrong with them
        return None


def model_sizes(config: Config, roles: Set[str]) -> dict[str, ModelSize]:
    """The sizes of the models of `roles`, each role's with the adapters that it trains.

    Raises:
        ModelError: a model cannot be found or trained.
    """
    from hybridflow.models.sizes import model_size
    from hybridflow.workers.model_spec import adapters_of

    measured: dict[tuple[str, bool], ModelSize] = {}
    sizes = {}
    trained = config.algorithm.trained_roles
    for role, path in model_paths(config, roles).items():
        key = path, role in trained
        if key not in measured:
            adapters = adapters_of(config) if role in trained else None
            measured[key] = model_size(path, adapters=adapters, trust_remote_code=config.model.trust_remote_code)
        sizes[role] = measured[key]
    return sizes
