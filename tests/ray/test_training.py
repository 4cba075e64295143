"""Each algorithm in whole runs, with what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow import export
from hybridflow.config.load import load_config
from hybridflow.train import main
from tests.metric_names import unexplained
from tests.ray.runs import Toy, metrics_of, trained
from tests.toy import make_tiny_model

REPOSITORY = Path(__file__).parents[2]
REAL_DATA = REPOSITORY.parent / "shared/data"


def test_a_dry_run_prints_configuration_and_placement_and_starts_nothing(
    toy: Toy, no_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(toy.config), f"run.folder={tmp_path / 'run'}", "placement.pools.main=1x2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert f"folder: {tmp_path / 'run'}" in text and "gae_lambda: 1.0" in text
    for role in ("actor", "critic", "reference", "rollout"):
        assert f"{role} on pool 'main': 1 node(s) x 2 CPU slot(s), data parallel 2 [" in text
    for role in ("data", "reward"):
        assert f"{role} on pool 'scoring': 1 node(s) x 1 CPU slot(s) [" in text
    assert not (tmp_path / "run").exists() and not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "ppo", "grpo"])
def test_an_algorithm_trains_validates_saves_and_is_exported(toy: Toy, cluster: None, tmp_path: Path, algorithm: str) -> None:
    run, exported = tmp_path / "run", tmp_path / "exported"
    files = [f"data.validation_files={toy.data}", "validation.before_training=true", "checkpoint.save_last=true"]
    responses = [] if algorithm == "sft" else ["algorithm.responses_per_prompt=2"]
    lines = trained(toy, run, f"algorithm={algorithm}", *responses, *files)

    assert [line["step"] for line in lines] == [0, 1, 2]
    assert not unexplained(name for line in lines for name in line)
    assert [("validation/reward/mean" in line) for line in lines] == [True, False, True]
    assert all(line["actor/grad_norm"] > 0 for line in lines[1:])
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2 * 3
    assert load_config(str(run / "config.yaml")).algorithm.name == algorithm

    assert export.main([str(run), str(exported)]) == 0
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(toy.model, dtype=torch.float32)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(exported).encode("12 + 1 = ")])
    assert not torch.allclose(model(tokens).logits, before(tokens).logits, atol=1e-4)


@pytest.mark.slow
def test_fine_tuning_raises_the_likelihood_of_the_answers(toy: Toy, cluster: None, tmp_path: Path) -> None:
    lines = trained(toy, tmp_path, "algorithm=sft", "run.total_steps=8", "data.prompts_per_step=20", "actor.learning_rate=1e-2")
    assert lines[-1]["actor/loss"] < 0.7 * lines[0]["actor/loss"]


@pytest.mark.slow
def test_ppo_with_every_option_trains(toy: Toy, cluster: None, tmp_path: Path) -> None:
    options = {
        "epochs": 2,
        "prompts_per_update": 2,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "kl_coefficient": 0.1,
        "dual_clip": 3.0,
        "clip": [0.2, 0.28],
        "entropy_coefficient": 0.01,
        "critic_warmup_steps": 1,
        "old_log_probs": "rollout",
        "loss_aggregation": "sequence_mean",
    }
    lines = trained(toy, tmp_path, *(f"algorithm.{name}={json.dumps(value)}" for name, value in options.items()))
    # 4 prompts, 2 responses each, 2 epochs: every response token counts twice.
    tokens = [2 * 8 * line["response/tokens_mean"] for line in lines]
    assert [line["critic/tokens"] for line in lines] == pytest.approx(tokens)
    assert "actor/tokens" not in lines[0], "the first step warms the critic up"
    assert lines[1]["actor/tokens"] == pytest.approx(tokens[1])
    assert lines[1]["actor/kl_to_reference"] > 0
    assert lines[1]["actor/ratio_max"] > 1


@pytest.mark.slow
def test_an_adaptive_kl_coefficient_rises_while_the_kl_is_above_its_target(toy: Toy, cluster: None, tmp_path: Path) -> None:
    options = ("kl_controller=adaptive", "kl_target=1e-6", "kl_horizon=100", "kl_coefficient=0.1", "epochs=2")
    lines = trained(toy, tmp_path, "run.total_steps=3", *(f"algorithm.{option}" for option in options))
    coefficients = [line["kl/coefficient"] for line in lines]
    # Ziegler et al. 2019, arXiv:1909.08593, section 2.2: error clipped to 0.2, times 8 rows of a horizon of 100. Step 1 has
    # the reference's own policy and a KL of 0, so the error is -0.2; from step 2 on the KL is far above the target.
    assert coefficients == pytest.approx([0.1, 0.1 * (1 - 0.2 * 8 / 100), 0.1 * (1 - 0.2 * 8 / 100) * (1 + 0.2 * 8 / 100)])


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="NOT RUN: needs vLLM")
def test_ppo_trains_with_vllm_in_its_process(toy: Toy, cluster: None, tmp_path: Path) -> None:
    # vLLM's attention on a CPU wants heads of 32 dimensions.
    model = make_tiny_model(tmp_path / "model", num_attention_heads=2, num_key_value_heads=1)
    settings = ("rollout.engine=vllm", "rollout.cpu_cache_gib=0.25", f"model.path={model}")
    lines = trained(toy, tmp_path / "run", *settings)
    assert all(line["mismatch/max"] < 1e-4 for line in lines)
    assert lines[1]["kl/mean"] != 0, "the second step generated with the weights of the first"


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="NOT RUN: needs vLLM")
@pytest.mark.parametrize(
    ("pools", "roles"),
    [
        ("{main: 1x2, scoring: 1x1 cpu}", "{data: scoring, reward: scoring}"),
        ("{main: 1x1, gen: 1x2, scoring: 1x1 cpu}", "{rollout: gen, data: scoring, reward: scoring}"),
    ],
    ids=["beside the actor", "on a pool of its own"],
)
def test_an_engine_on_two_ranks_keeps_up_with_the_actor(
    toy: Toy, cluster: None, tmp_path: Path, pools: str, roles: str
) -> None:
    model = make_tiny_model(tmp_path / "model", hidden_size=128)
    settings = ("rollout.engine=vllm", "rollout.tensor_parallel=2", "rollout.cpu_cache_gib=0.25", f"model.path={model}")
    places = (f"placement.pools={pools}", f"placement.roles={roles}")
    lines = trained(toy, tmp_path / "run", *settings, *places)
    assert all(line["mismatch/max"] < 1e-4 for line in lines)
    assert lines[1]["kl/mean"] != 0, "the second step generated with the weights of the first"
    assert lines[0]["sync/bytes_received"] == lines[0]["sync/bytes_missing"] > 0


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real datasets are not in ../shared/data")
def test_the_real_gsm8k_goes_through_the_whole_path(cluster: None, tmp_path: Path) -> None:
    data, model, run = tmp_path / "data", tmp_path / "model", tmp_path / "run"
    script("examples/gsm8k/prepare.py", "--source", REAL_DATA / "gsm8k", "--local_dir", data)
    script("examples/quickstart/make_model.py", "--kind", "bytes", "--folder", model)
    files = [f"data.train_files={data}/train.parquet", f"data.validation_files={data}/test.parquet"]
    short = ["run.total_steps=1", "validation.max_prompts=4", "trackers.names=[]"]
    config = str(REPOSITORY / "configs/gsm8k_ppo_cpu.yaml")
    assert main([config, f"run.folder={run}", f"model.path={model}", *files, *short]) == 0

    before, first = metrics_of(run)
    assert before["validation/reward/mean"] == 0, "random weights solve nothing"
    assert first["prompt/tokens_mean"] > 100, "the questions, one byte per token"
    assert {"reward/accuracy", "reward/format", "actor/grad_norm", "critic/grad_norm", "kl/mean"} <= first.keys()
    assert (run / "checkpoints/step_000001/manifest.json").is_file()
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert 'output the final answer after "####"' in sample["prompt"] and float(sample["ground_truth"]) > 0


def script(path: str, *arguments: object) -> None:
    """Run a script of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, REPOSITORY / path, *map(str, arguments)], check=True, env=environment)
