"""Rules about generation that runs ahead of training, validation beside it, and the longest row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config_cases import mistakes_of, model_folder, only_mistake, right_run


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test sees the same machine: no GPU, 4 CPU slots, no cluster to join."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def test_the_longest_row_that_is_asked_for_fits_the_context_and_leaves_room_for_a_response(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", context=600)
    lengths = ["data.max_prompt_tokens=200", "data.max_response_tokens=100", f"model.path={folder}"]
    found = only_mistake(tmp_path, *lengths, "rollout.max_model_tokens=601")
    assert found.startswith(
        f"rollout.max_model_tokens: rollout.max_model_tokens=601 make 601 tokens; model.path='{folder}' reads"
    )
    assert "Use at least 201" in only_mistake(tmp_path, *lengths, "rollout.max_model_tokens=200")
    assert mistakes_of([*right_run(tmp_path), *lengths, "rollout.max_model_tokens=201"]) == []


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "no pool is named for it: set placement.roles.validation"),
        (["placement.roles.validation=main"], "placement.roles.validation is 'main', where the actor trains"),
        (["placement.roles.validation=extra", "data.validation_files=[]"], "data.validation_files is empty"),
    ],
)
def test_concurrent_validation_needs_ranks_of_its_own_and_files(tmp_path: Path, overrides: list[str], problem: str) -> None:
    pools = ["placement.pools.extra=1x1", f"data.validation_files={tmp_path / 'train.parquet'}", "validation.concurrent=true"]
    assert problem in only_mistake(tmp_path, *pools, *overrides)
    assert mistakes_of([*right_run(tmp_path), *pools, "placement.roles.validation=extra"]) == []


def test_a_pool_of_concurrent_validation_counts_as_used_only_then(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = ["placement.pools.extra=1x1", "placement.roles.validation=extra"]
    assert mistakes_of([*right_run(tmp_path), *pool, "placement.pools.main=1x3"]) == []
    assert "placement.pools.extra: no role is on it" in caplog.text
    files = [f"data.validation_files={tmp_path / 'train.parquet'}", "validation.concurrent=true"]
    found = only_mistake(tmp_path, *pool, *files, "placement.pools.main=1x3")
    assert "need 3 + 1 + 1 = 5 CPU slots" in found


def test_only_an_algorithm_that_generates_and_scores_can_run_ahead(tmp_path: Path) -> None:
    found = only_mistake(tmp_path, "algorithm=sft", "loop.max_staleness=1")
    assert found == "loop.max_staleness: found 1, but sft has no rollout and reward roles. Set it to 0"
    assert mistakes_of([*right_run(tmp_path), "algorithm=grpo", "loop.max_staleness=1"]) == []


def test_what_an_error_is_about_is_data_and_not_its_wording(tmp_path: Path) -> None:
    broken = ["placement.pools.main=5", "placement.roles.actor=elsewhere"]  # one entry; the other pools are known
    assert len(mistakes_of([*right_run(tmp_path), *broken])) == 2
    assert len(mistakes_of([*right_run(tmp_path), "placement.pools=5", "placement.roles.actor=elsewhere"])) == 1
