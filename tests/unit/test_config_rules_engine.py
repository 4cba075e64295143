"""Rules about generation engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hybridflow import registry
from hybridflow.config.rules_engine import ENGINES, EngineArguments
from tests.unit.config_cases import mistakes_of, right_run


def about(key: str, overrides: list[str]) -> list[str]:
    return [mistake for mistake in mistakes_of(overrides) if mistake.startswith(f"command line: {key}")]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is a package with an engine of three arguments."""
    source = tmp_path / "path/made_up_engine/arguments.py"
    source.parent.mkdir(parents=True)
    (source.parent / "__init__.py").write_text("raise ImportError('a rule imports it')")
    source.write_text(
        "class Other:\n    b: int = 1\n\nclass Args:\n    seed: int = 0\n    block_size: int = 1\n    c: str\n    d = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    monkeypatch.setitem(ENGINES, "vllm", EngineArguments(ENGINES["vllm"].keys, "made_up_engine", "arguments.py", "Args"))


@pytest.mark.usefixtures("installed")
def test_every_wrong_engine_option_is_named(tmp_path: Path) -> None:
    options = ["block_size=32", "block_sise=32", "b=1", "seed=3", "gpu_memory_utilization=0.5"]
    given = [f"rollout.engine_options.{option}" for option in options]
    found = about("rollout.engine_options", [*right_run(tmp_path), "rollout.engine=vllm", *given])
    assert [mistake.removeprefix("command line: rollout.engine_options.") for mistake in found] == [
        "block_sise: vllm's engine has no such argument; did you mean 'block_size'?",
        "b: vllm's engine has no such argument",
        "seed: vllm's seed comes from run.seed: set that, and leave this out",
        "gpu_memory_utilization: vllm's gpu_memory_utilization comes from rollout.gpu_memory_utilization (on a CPU "
        "rollout.cpu_cache_gib): set that, and leave this out",
    ]


def test_options_of_an_engine_that_is_not_installed_here_are_believed(tmp_path: Path) -> None:
    options = ["rollout.engine=sglang", "rollout.engine_options.made_up=1", "rollout.engine_options.tp_size=2"]
    (found,) = about("rollout.engine_options", [*right_run(tmp_path), *options])
    assert "tp_size comes from rollout.tensor_parallel" in found


def test_the_torch_engine_has_no_options(tmp_path: Path) -> None:
    (found,) = about("rollout.engine_options", [*right_run(tmp_path), "rollout.engine_options.block_size=16"])
    assert "block_size: the torch engine has no options. Leave it out" in found


def test_there_are_rules_for_every_built_in_engine() -> None:
    assert set(ENGINES) == set(registry.ENGINES)


@pytest.mark.vllm
def test_the_arguments_of_vllm_are_those_in_its_source() -> None:
    arg_utils = pytest.importorskip("vllm.engine.arg_utils", reason="NOT RUN: vllm is not installed")
    assert ENGINES["vllm"].names() == {field.name for field in dataclasses.fields(arg_utils.EngineArgs)}
    assert set(ENGINES["vllm"].keys) <= (ENGINES["vllm"].names() or set())


def test_a_value_out_of_range_is_told_once(tmp_path: Path) -> None:
    (found,) = about("rollout.top_p", [*right_run(tmp_path), "rollout.engine=vllm", "rollout.top_p=1.5"])
    assert found.endswith("found 1.5 (number); needed: a number of more than 0 and at most 1")


@pytest.mark.parametrize("cut", ["rollout.top_p=0.9", "rollout.top_k=20", "rollout.min_p=0.05"])
def test_a_cut_whose_log_probabilities_training_does_not_compute_is_a_mistake(tmp_path: Path, cut: str) -> None:
    engine = [*right_run(tmp_path), "rollout.engine=vllm", cut]
    key, _, value = cut.partition("=")
    (mistake,) = about_log_probs(engine)
    assert mistake.startswith(f"command line: {key}: found {value}, and vllm would give")
    raw = "rollout.engine_options.logprobs_mode=raw_logprobs"
    assert not about_log_probs([*engine, raw])
    assert not about_log_probs([*engine, "rollout.engine=torch"])
    assert "found raw_logprobs, which is at temperature 1, and rollout.temperature=0.7" in "".join(
        mistakes_of([*engine, raw, "rollout.temperature=0.7"])
    )


def about_log_probs(overrides: list[str]) -> list[str]:
    return [mistake for mistake in mistakes_of(overrides) if "log-probabilities" in mistake]


@pytest.mark.parametrize("engine", ["torch", "sglang"])
def test_engines_that_do_not_cut_weights_are_asked_for_one_rank(tmp_path: Path, engine: str) -> None:
    settings = [f"rollout.engine={engine}", "rollout.tensor_parallel=2", "placement.pools.main=1x2", "placement.cpu_slots=4"]
    (found,) = about("rollout.tensor_parallel", [*right_run(tmp_path), *settings])
    assert found.endswith(f"found 2, but the {engine} engine does not shard weights. Use 1, or rollout.engine=vllm")


def test_a_cache_larger_than_the_memory_of_this_machine_is_a_mistake_without_gpus(tmp_path: Path) -> None:
    settings = [*right_run(tmp_path), "rollout.engine=vllm", "rollout.cpu_cache_gib=1e6"]
    (found,) = about("rollout.cpu_cache_gib", settings)
    assert "found 1e+06 GiB for each rank, but this machine has" in found
    assert not about("rollout.cpu_cache_gib", [*settings, "run.device=cuda"])
