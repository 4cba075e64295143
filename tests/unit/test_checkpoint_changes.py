"""Which settings of a resumed run are told to be other than those of its checkpoint."""

from __future__ import annotations

import dataclasses
import json

from hybridflow.algorithms.ppo import Config as PpoConfig
from hybridflow.checkpoint.changes import changes, changes_of_the_policy
from hybridflow.config.schema import AlgorithmConfig, Config, DataConfig, ModelConfig, RunConfig, TrainingConfig


def settings(**sections: object) -> dict[str, object]:
    base = Config(algorithm=AlgorithmConfig(options=PpoConfig()))
    return dataclasses.asdict(dataclasses.replace(base, **sections))  # type: ignore[arg-type]


def written(**sections: object) -> dict[str, object]:
    """As a checkpoint holds it."""
    return json.loads(json.dumps(settings(**sections)))


def test_the_same_settings_have_no_changes() -> None:
    assert changes(written(), settings()) == []


def test_each_key_that_matters_has_a_line() -> None:
    now = settings(
        run=RunConfig(seed=1),
        data=DataConfig(train_files=("b.parquet", "c.parquet")),
        actor=TrainingConfig(path="other"),
        algorithm=AlgorithmConfig(options=PpoConfig(epochs=2)),
    )
    assert changes(written(data=DataConfig(train_files=("a.parquet",))), now) == [
        "run.seed: 0 then, 1 now",
        "algorithm.epochs: 1 then, 2 now",
        'data.train_files: ["a.parquet"] then, ["b.parquet", "c.parquet"] now',
        "actor.path: null then, other now",
    ]


def test_where_things_lie_and_how_they_are_kept_does_not_matter() -> None:
    now = settings(run=RunConfig(folder="moved", timeout_s=60.0), actor=TrainingConfig(offload_optimizer=True))
    assert changes(written(), now) == []


def test_keys_of_another_release_are_left_out() -> None:
    older = written()
    del older["actor"]["schedule"]  # type: ignore[attr-defined]
    older["actor"]["momentum"] = 0.9  # type: ignore[index]
    assert changes(older, settings()) == []


def test_another_scale_of_adapters_is_another_policy() -> None:
    then = written(model=ModelConfig(lora_rank=4, lora_alpha=32.0))
    lines = changes(then, settings(model=ModelConfig(lora_rank=4, lora_alpha=64.0), run=RunConfig(seed=1)))
    assert changes_of_the_policy(lines, has_adapters=True) == ["model.lora_alpha: 32.0 then, 64.0 now"]
    lines = changes(then, settings(model=ModelConfig(lora_rank=4), run=RunConfig(seed=1)))
    assert changes_of_the_policy(lines, has_adapters=True) == []


def test_a_scale_that_no_adapter_has_changes_nothing() -> None:
    lines = changes(written(), settings(model=ModelConfig(lora_alpha=64.0)))
    assert lines and changes_of_the_policy(lines, has_adapters=False) == []
    lines = changes(written(model=ModelConfig(lora_rank=4)), settings())
    assert changes_of_the_policy(lines, has_adapters=False) == ["model.lora_rank: 4 then, 0 now"]
