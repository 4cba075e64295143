"""Which part may import which, and where each dependency lives."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hybridflow import registry
from hybridflow.errors import ConfigError
from tests.architecture import limits

PACKAGE = limits.sources("hybridflow")

LEVELS = (
    ("disk", "ending", "errors", "guardian", "interrupts", "pickled", "registry", "tokenizers", "user_file"),
    ("config", "batch", "columns", "metrics"),
    ("ops", "planner", "parallel", "rewards", "trackers", "data"),
    ("models", "rollout", "resharding", "checkpoint", "environments"),
    ("workers",),
    ("algorithms",),
    ("controller",),
    ("__init__", "train", "export", "report", "evaluate", "api"),
    ("model_merger",),
)
"""From what everything may import to what nothing may."""

HOMES = {
    "ray": ("controller/",),
    "vllm": tuple(f"rollout/vllm_{part}.py" for part in ("arguments", "engine", "patches", "scheduler")),
    "sglang": ("rollout/sglang_engine.py",),
    "flash_attn": ("models/attention.py",),
    "omegaconf": ("config/load.py",),
    "pydantic": ("config/",),
    "annotated_types": ("config/",),
    "pyarrow": ("data/",),
    "math_verify": ("rewards/",),
    "httpx": ("rewards/service.py",),
    "peft": ("models/",),
    "wandb": ("trackers/wandb.py",),
    "mlflow": ("trackers/mlflow.py",),
    "torch.utils.tensorboard": ("trackers/tensorboard.py",),
    "tensorboard": ("trackers/tensorboard.py",),
    "aiohttp": ("environments/sessions.py",),
    "matplotlib": ("trackers/plots.py", "trackers/timeline.py"),
}
"""Each dependency and the only places below hybridflow/ that may import it."""

OPTIONAL_PACKAGES = {"vllm", "sglang", "flash_attn", "wandb", "mlflow", "peft"}

WITHOUT_TORCH = (
    "hybridflow.errors",
    "hybridflow.registry",
    "hybridflow.metrics",
    "hybridflow.batch",
    "hybridflow.config.load",
    "hybridflow.planner.options",
    "hybridflow.planner.needs",
    *sorted({target.partition(":")[0] for target in registry.ALGORITHMS.values()}),
)
"""A mistake in a configuration is reported without waiting for torch."""

TABLES = {
    "algorithm.name": registry.ALGORITHMS,
    "placement.workers": registry.ROLES,
    "rollout.engine": registry.ENGINES,
    "reward.name": registry.REWARDS,
    "trackers.names": registry.TRACKERS,
    "protocol": registry.PROTOCOLS,
}


def test_imports_point_one_way():
    violations = [found for source in PACKAGE for found in limits.upward_imports(source, LEVELS)]
    assert not violations, limits.report(violations)


def test_parts_import_each_other_in_no_circle():
    assert not limits.part_cycle(PACKAGE)


def test_each_dependency_has_one_home():
    violations = [found for source in PACKAGE for found in limits.strayed_imports(source, HOMES)]
    assert not violations, limits.report(violations)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_configuration_is_checked_without_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=limits.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"importing {module} imports torch or ray, or fails:\n{result.stderr}"


def test_the_controller_starts_ray_before_anything_imports_torch():
    code = "import sys, hybridflow.controller.run; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=limits.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"importing hybridflow.controller.run imports torch, or fails:\n{result.stderr}"


@pytest.mark.parametrize(("key", "name"), [(key, name) for key, table in TABLES.items() for name in table])
def test_every_name_in_a_table_imports(key: str, name: str):
    try:
        assert registry.load(name, TABLES[key], key=key) is not None
    except ConfigError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and (missing.name or "").split(".")[0] in OPTIONAL_PACKAGES:
            pytest.skip(f"NOT RUN: {key}={name} needs the optional package {missing.name!r}, which is not installed")
        raise


@pytest.mark.parametrize("name", sorted(registry.ALGORITHMS))
def test_an_algorithm_inherits_from_no_other(name: str):
    algorithm = registry.load(name, registry.ALGORITHMS, key="algorithm.name")
    base = importlib.import_module("hybridflow.algorithms.base")
    assert isinstance(algorithm, type)
    assert algorithm.__bases__ in ((base.Algorithm,), (base.PolicyAlgorithm,))
