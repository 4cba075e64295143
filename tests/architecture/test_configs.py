"""The configuration: how large it may grow, and that every YAML in configs/ is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridflow import registry
from hybridflow.config.load import load_config
from hybridflow.config.schema import AlgorithmConfig, Config
from hybridflow.errors import ConfigError, FieldError
from tests.architecture import limits

MAX_LEAVES = 179
MAX_DEPTH = 3
YAML_FILES = sorted((limits.ROOT / "configs").rglob("*.yaml"))
KEYS_OF_FILES = {"model.path", "model.tokenizer", "data.train_files", "data.validation_files", "environment.path"}
"""What a configuration names is not there before it has been prepared."""


def depends_on_the_machine(mistake: FieldError) -> bool:
    """A file that is not prepared here, or an optional package that is not installed."""
    return mistake.key in KEYS_OF_FILES or "needs the package" in mistake.problem


def leaves(instance: object, prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration, values of mappings not counted."""
    assert dataclasses.is_dataclass(instance)
    for field in dataclasses.fields(instance):
        value = vars(instance)[field.name]
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def complete_config(name: str) -> Config:
    """The defaults, with the options of algorithm `name`."""
    algorithm = registry.load(name, registry.ALGORITHMS, key="algorithm.name")
    return Config(algorithm=AlgorithmConfig(name=name, options=vars(algorithm)["config_class"]()))


@pytest.mark.parametrize("name", sorted(registry.ALGORITHMS))
def test_the_configuration_has_few_keys(name: str):
    keys = list(leaves(complete_config(name)))
    assert len(keys) <= MAX_LEAVES, f"hybridflow/config/schema.py: {len(keys)} keys with {name}, allowed {MAX_LEAVES}"


@pytest.mark.parametrize("name", sorted(registry.ALGORITHMS))
def test_the_configuration_is_flat(name: str):
    # `algorithm.options.clip` is written `algorithm.clip`, which is where the limit counts.
    deep = [key for key in leaves(complete_config(name)) if key.replace(".options.", ".").count(".") >= MAX_DEPTH]
    assert not deep, f"hybridflow/config/schema.py: keys deeper than {MAX_DEPTH} levels: {deep}"


@pytest.mark.parametrize("class_name", sorted({type(section).__name__ for section in vars(Config()).values()}))
def test_every_field_is_explained(class_name: str):
    (schema,) = [source for source in limits.sources("hybridflow/config") if source.path.endswith("/schema.py")]
    unexplained = limits.unexplained_fields(schema, class_name)
    assert not unexplained, limits.report(unexplained)


def test_there_are_configurations():
    assert len(YAML_FILES) >= 7


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_every_configuration_loads(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    try:
        load_config(str(path))
    except ConfigError as error:
        mistakes = [mistake for mistake in error.errors if not depends_on_the_machine(mistake)]
        assert not mistakes, "\n".join(map(str, mistakes))
