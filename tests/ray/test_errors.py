"""What a user reads when something is wrong, and that nothing is left running or half written."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from hybridflow.checkpoint.store import CheckpointStore
from hybridflow.controller import placement
from hybridflow.train import main
from tests.ray.processes import training, wait_until
from tests.ray.runs import HERE, Toy, metrics_of, trained
from tests.small_disk import small_disk_at

CHECKPOINT = "checkpoints/step_000001"


def said(toy: Toy, folder: Path, overrides: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code of the command, and what it wrote to standard error beside its log."""
    capsys.readouterr()
    code = main([str(toy.config), f"run.folder={folder}", *overrides])
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.temprature=1", "rollout.temprature: no such key; did you mean 'rollout.temperature'?"),
        ("actor.learning_rate=fast", "actor.learning_rate: found 'fast' (text); needed: a number"),
        ("rollout.top_p=1.5", "rollout.top_p: found 1.5 (number); needed: a number of more than 0 and at most 1"),
        ("algorithm.prompts_per_update=8", "algorithm.prompts_per_update: found 8, more than the 4 prompts of"),
        (
            "placement.pools.main=1x99",
            "placement.pools: pools main (1x99), scoring (1x1 cpu) need 99 + 1 = 100 CPU slots, one for each rank;",
        ),
        ("data.max_response_tokens=500", "data.max_prompt_tokens=96 and data.max_response_tokens=500 make 596 tokens;"),
        ("data.train_files=absent.parquet", "data.train_files: file 'absent.parquet' does not exist"),
        ("reward.function=compute_scores", "reward.function: {here}/digit_share.py has no 'compute_scores'; did you mean"),
        ("reward.options.reward_input=2", "compute_score of {here}/digit_share.py: takes (reward_input, options); expected"),
        ("reward.path=absent.py", "reward.path: file 'absent.py' does not exist"),
        ("checkpoint.resume=absent", "checkpoint.resume: folder 'absent' does not exist"),
    ],
)
def test_a_mistake_in_the_configuration_is_told_before_anything_starts(
    toy: Toy, no_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    code, text = said(toy, tmp_path / "run", [override], capsys)
    assert code == 2
    assert text.startswith("1 error in the configuration:\n")
    assert expected.format(here=HERE) in text
    assert not (tmp_path / "run").exists() and not ray.is_initialized()


def test_a_model_without_a_tokenizer_is_told_before_anything_starts(
    toy: Toy, no_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy.model, model, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*", "*.jinja"))
    code, text = said(toy, tmp_path / "run", [f"model.path={model}"], capsys)
    assert code == 2
    assert f"model.path: folder '{model}' holds no tokenizer" in text
    assert not (tmp_path / "run").exists() and not ray.is_initialized()


def test_several_mistakes_are_all_listed(
    toy: Toy, no_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["rollout.temprature=1", "rollout.top_p=1.5", "data.train_files=absent.parquet", "placement.pools.main=two"]
    code, text = said(toy, tmp_path / "run", overrides, capsys)
    assert code == 2
    assert text.startswith("4 errors in the configuration:\n") and len(text.splitlines()) == 5
    keys = ("rollout.temprature", "rollout.top_p", "data.train_files", "placement.pools.main")
    assert all(f" {key}: " in text for key in keys)


def test_a_cluster_that_does_not_answer_ends_the_run_at_once(
    toy: Toy, no_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens: connections are refused
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        started = time.monotonic()
        code, text = said(toy, tmp_path / "run", [f"run.ray_address={address}"], capsys)
    assert code == 1
    assert f"no Ray cluster answers at {address}" in text and "run.ray_address" in text
    assert time.monotonic() - started < 30
    assert not (tmp_path / "run").exists() and not ray.is_initialized()


def test_a_run_folder_that_cannot_be_written_is_told_before_anything_starts(
    toy: Toy, no_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code, text = said(toy, tmp_path / "file" / "run", [], capsys)
    assert code == 2 and not ray.is_initialized()
    assert f"run.folder: {tmp_path}/file/run cannot be written: {tmp_path}/file is a file" in text


def test_a_pool_that_the_cluster_cannot_hold_is_told(
    toy: Toy, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "QUICK_PLACEMENT_S", 0.1)
    monkeypatch.setattr(placement, "PLACEMENT_TIMEOUT_S", 2.0)
    # With an address, the size of the cluster is not known before it is joined.
    overrides = ["run.ray_address=auto", "placement.pools.main=1x9"]
    code, text = said(toy, tmp_path / "run", overrides, capsys)
    assert code == 1
    assert "pool 'main' asks for 1 node(s) with 9 CPUs each" in text and "1 node(s): 8 CPUs and 0 GPUs" in text


def test_a_dataset_that_is_empty_after_filtering_is_told(
    toy: Toy, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(toy, tmp_path / "run", ["data.max_prompt_tokens=5"], capsys)
    assert code == 1
    assert is_short(text)
    # The shortest prompt is "user: 12 + 0 = \nassistant: ", one token per character.
    assert (
        "data.train_files: 0 of 40 prompts are" in text and "the shortest has 27 tokens. Raise data.max_prompt_tokens" in text
    )


def test_a_missing_column_is_told_before_anything_starts(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"question": ["1+1="], "data_source": ["x"]}), file)
    code, text = said(toy, tmp_path / "run", [f"data.train_files={file}"], capsys)
    assert code == 2
    assert "Traceback" not in text and len(text.splitlines()) <= 6
    assert f"{file}: " in text and "'prompt'" in text and "question" in text


def test_a_corrupt_checkpoint_is_told_and_not_read(
    toy: Toy, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ["algorithm=grpo", "run.total_steps=1", "checkpoint.save_last=true"]
    trained(toy, tmp_path / "run", *saving)
    (damaged,) = (tmp_path / "run" / CHECKPOINT / "actor").glob("*.distcp")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0xFF
    damaged.write_bytes(content)
    code, text = said(toy, tmp_path / "run", [*saving, "run.total_steps=2"], capsys)
    assert code == 1
    assert is_short(text)
    assert f"{damaged} has the checksum" in text and "checkpoint.resume" in text
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1]


def test_other_settings_than_those_of_the_checkpoint_are_told_and_another_algorithm_is_refused(
    toy: Toy, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    saving = ["algorithm.kl_controller=adaptive", "checkpoint.save_last=true", "checkpoint.every_steps=0"]
    trained(toy, tmp_path, *saving, "run.total_steps=1")
    code, text = said(toy, tmp_path, ["algorithm=grpo"], capsys)
    assert code == 1 and is_short(text)
    assert "was written by algorithm" in text
    caplog.clear()
    # The KL controller has no state any more, which is no reason to stop either.
    trained(toy, tmp_path, "actor.learning_rate=1e-4", "validation.max_prompts=3")
    told = "\n".join(record.message for record in caplog.records if record.levelname == "WARNING")
    assert "  run.total_steps: 1 then, 2 now" in told
    assert "  algorithm.kl_controller: adaptive then, fixed now" in told
    assert "  actor.learning_rate: 0.001 then, 0.0001 now" in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Room for one checkpoint of the toy model without critic, and not for two."""
    with small_disk_at(tmp_path / "small_disk", mebibytes=2) as folder:
        yield folder


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    toy: Toy, cluster: None, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = said(toy, small_disk / "run", ["algorithm=grpo", "checkpoint.every_steps=1"], capsys)
    assert code == 1
    assert is_short(text)
    assert "the checkpoint of step 2 could not be written" in text and "bytes were free" in text
    assert [path.name for path in (small_disk / "run/checkpoints").iterdir()] == ["step_000001"]
    CheckpointStore.verify(small_disk / "run" / CHECKPOINT)


@pytest.mark.parametrize("worker", ["SaysGoodbye", "NeverCloses"])
def test_a_failed_run_closes_the_workers_that_answer_and_tells_what_failed_first(
    toy: Toy, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], worker: str
) -> None:
    algorithm, reward = (f"tests.ray.failing_parts:{name}" for name in ("DividesByZero", worker))
    code, text = said(toy, tmp_path, [f"algorithm={algorithm}", f"placement.workers.reward={reward}"], capsys)
    assert code == 1 and is_short(text)
    assert "ZeroDivisionError: one response to no prompts" in text
    assert (tmp_path / "closed").exists() == (worker == "SaysGoodbye")


@pytest.mark.slow
def test_a_failure_of_the_algorithm_ends_every_process_of_the_run(toy: Toy, tmp_path: Path) -> None:
    arguments = [str(toy.config), f"run.folder={tmp_path / 'run'}", "algorithm=tests.ray.failing_parts:DividesByZero"]
    with training(arguments, tmp_path / "log") as run:
        assert run.wait() == 1
        text = run.log.read_text()
        assert text.count("ZeroDivisionError: one response to no prompts") == 1
        wait_until(lambda: not run.working(), lambda: f"outlived the run: {run.working()}", timeout_s=30)


def is_short(text: str) -> bool:
    """Whether a user is told the cause without a traceback."""
    _, _, message = text.partition("The run failed.\n")
    return bool(message) and "Traceback" not in text and len(message.splitlines()) <= 6


def test_weights_that_are_not_sent_end_the_run_although_the_engines_wait_for_them(
    toy: Toy, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["placement.workers.actor=tests.ray.failing_parts:SendsNothing", "placement.roles.rollout=gen"]
    pools = "placement.pools={main: 1x1, gen: 1x1, scoring: 1x1 cpu}"
    code, text = said(toy, tmp_path / "run", [*overrides, pools, "run.timeout_s=90"], capsys)
    assert code == 1
    assert "actor.send_weights failed on rank 0" in text and "nothing was sent" in text
