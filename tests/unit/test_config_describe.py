"""The resolved configuration reads back to itself, and the documentation is current."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from docs.tables import FILE, FROM_VERL, MADE_BELOW, documentation, field_docs, verls_keys
from hybridflow.config.load import load_config, resolved_yaml
from hybridflow.config.schema import Config
from tests.unit.config_cases import right_run

AWKWARD = [
    ["rollout.stop=['1e-6', '\\${x}', 'null', \"a\\nb\", 'yes', '#', ' x ']"],
    ["reward.name=json:loads", "reward.options={a: {b: [1, 2.5, null, 'true']}, 'with space': 1e-30}"],
    ["algorithm=grpo", "algorithm.prompts_per_update=null", "algorithm.clip=[0.1,0.3]"],
    ["placement.pools={b: 1x1, a: 1x2}", "placement.roles={}", "trackers.run_name='2026-11-21'"],
    ["actor.max_grad_norm=1e30", "actor.learning_rate=1.2345678901234567e-6"],
]


@pytest.mark.parametrize("overrides", AWKWARD)
def test_the_resolved_yaml_loads_to_an_equal_config(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(None, [*right_run(tmp_path), *overrides])
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(config))
    again = load_config(str(tmp_path / "resolved.yaml"))
    assert again == config
    assert list(again.placement.pools) == list(config.placement.pools)  # the first pool is the default one


def test_every_field_is_explained() -> None:
    for section in vars(Config()).values():
        assert field_docs(type(section)).keys() == {field.name for field in fields(section)}


def test_the_documentation_is_current() -> None:
    for path, made in ((FILE, documentation), (FROM_VERL, verls_keys)):
        text = path.read_text(encoding="utf-8")
        assert MADE_BELOW in text and text == made(text), "run: python -m docs.tables"
