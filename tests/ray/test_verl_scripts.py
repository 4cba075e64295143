"""A published launch script for verl runs as it stands but for the module's name, and so does what its text suggests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybridflow.data.prepare import PreparedRow, write_parquet
from tests.toy import make_tiny_model

SHARED = Path(__file__).parents[3] / "shared"
ARTICLES = sorted(SHARED.glob("seeds/000_*.txt"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ARTICLES, reason="the article with the script is not in ../shared/seeds"),
    pytest.mark.skipif(sys.platform != "linux", reason="bash and /proc"),
]
ROOT = Path(__file__).parents[2]
ON_A_CPU = [
    "actor_rollout_ref.rollout.name=hf",
    "trainer.total_training_steps=2",
    "ray_kwargs.ray_init.num_cpus=4",
    "trainer.val_before_train=False",
    "+trainer.log_val_generations=1",
]
"""For the script's own `"$@"`: two steps with the engine that needs no GPU."""


REWARD = """
import re
from typing import Any

REWARD_NAME = "gsm8k"
REWARD_TYPE = "sequential"


def compute_score(reward_input: dict[str, Any], **kwargs) -> dict[str, float]:
    numbers = re.findall(r"-?[0-9]+", reward_input["response"])
    accuracy = float(bool(numbers) and numbers[-1] == reward_input["ground_truth"])
    form = 0.2 * bool(re.search(r"####|<answer>", reward_input["response"])) + 0.3 * bool(numbers)
    return {{"overall": {weight} * accuracy + (1 - {weight}) * form, "accuracy": accuracy, "format": form}}
"""
"""Of the form of the article's two files, whose indentation the article has lost."""


def part(begin: str, end: str) -> str:
    """What the article has from `begin` to just before `end`."""
    text = ARTICLES[0].read_text()
    return text[text.index(begin) : text.index(end, text.index(begin))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forking: Path) -> Path:
    """A folder with a model, GSM8K-like data with string prompts, reward files like the article's, and its script."""
    folder = tmp_path_factory.mktemp("verl")
    make_tiny_model(folder / "model")
    for name, source in (("train", "openai/gsm8k"), ("test", "openai/gsm8k"), ("math", "DigitalLearningGmbH/MATH-lighteval")):
        rows = [PreparedRow(prompt=f"{n} + {n} = ", ground_truth=str(2 * n), data_source=source) for n in range(24)]
        write_parquet(rows, folder / f"{name}.parquet")
    for name, weight in (("gsm8k_reward", 1.0), ("gsm8k_reward_advanced", 0.75)):
        (folder / f"{name}.py").write_text(REWARD.format(weight=weight))
    script = part("#!/bin/bash\n# run_qwen2.5_0.5b_ppo_single_gpu.sh", "How to Read the Configuration")
    assert script.count("verl.trainer.main_ppo") == 1
    (folder / "run.sh").write_text(script.replace("verl.trainer.main_ppo", "hybridflow.train"))
    # A link would not find its packages.
    (folder / "python3").write_text(f'#!/bin/sh\nPYTHONPATH={forking}:{ROOT} exec {sys.executable} "$@"\n')
    (folder / "python3").chmod(0o755)
    return folder


def run_script(place: Path, *arguments: str, **variables: str) -> str:
    """What the script writes; its variables are set as its text says, in the environment."""
    sizes = {"TRAIN_BATCH_SIZE": "8", "PPO_MINI_BATCH_SIZE": "4", "MAX_PROMPT_LENGTH": "64", "MAX_RESPONSE_LENGTH": "8"}
    files = {"MODEL_PATH": f"{place}/model", "GSM8K_TRAIN_FILE": f"{place}/train.parquet"}
    files |= {
        "GSM8K_TEST_FILE": f"{place}/test.parquet",
        "EXPERIMENT_NAME": "toy",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }
    environment = os.environ | {"PATH": f"{place}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(place / "run.sh"), *ON_A_CPU, *arguments],
        cwd=place,
        env=environment | sizes | files | variables,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def metrics_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_script_runs_to_its_end_with_weights_and_biases_offline(place: Path) -> None:
    said = run_script(place)
    folder = place / "checkpoints/verl_ppo_gsm8k/toy"
    assert [line["step"] for line in metrics_of(folder)] == [1, 2]
    assert not any(name.startswith("kl/") for name in metrics_of(folder)[0]), "verl's default has no KL"
    (logged,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"critic/loss" in logged.read_bytes()
    assert "has verl's default, not ours" in said and "step 2/2" in said


def test_what_the_article_suggests_runs_too(place: Path) -> None:
    """Its first reward file, KL in the reward, LoRA, two epochs, MATH beside GSM8K, the critic first; saved and resumed."""
    changes = [
        f"custom_reward_function.path={place}/gsm8k_reward.py",
        "custom_reward_function.name=compute_score",
        "algorithm.use_kl_in_reward=True",
        "algorithm.kl_ctrl.kl_coef=0.001",
        "algorithm.kl_ctrl.type=fixed",
        "actor_rollout_ref.actor.lora.rank=4",
        "actor_rollout_ref.actor.ppo_epochs=2",
        f"data.train_files=['{place}/train.parquet','{place}/math.parquet']",
        "trainer.critic_warmup=1",
        "trainer.save_freq=1",
        "trainer.logger=[console]",
    ]
    folder = place / "checkpoints/verl_ppo_gsm8k/changed"
    run_script(place, *changes, EXPERIMENT_NAME="changed")
    assert {"kl/mean", "reward/accuracy", "reward/format"} <= metrics_of(folder)[0].keys()
    said = run_script(place, *changes, "trainer.total_training_steps=3", EXPERIMENT_NAME="changed")
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 3] and re.search("(continu|resum)", said)
    merge = ["-m", "hybridflow.model_merger", "merge", "--backend", "fsdp"]
    for local, target in ((folder / "checkpoints/step_000003/actor", "merged"), (folder / "global_step_2/actor", "merged_2")):
        command = [sys.executable, *merge, "--local_dir", str(local), "--target_dir", str(place / target)]
        subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(place / "merged").config.vocab_size > 0


def test_grpo_and_the_second_reward_file_run_too(place: Path) -> None:
    changes = [
        "algorithm.adv_estimator=grpo",
        f"custom_reward_function.path={place}/gsm8k_reward_advanced.py",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.kl_loss_coef=0.01",
        "trainer.logger=[console]",
    ]
    run_script(place, *changes, ROLLOUT_N="4", EXPERIMENT_NAME="grpo")
    metrics = metrics_of(place / "checkpoints/verl_ppo_gsm8k/grpo")[-1]
    assert "critic/loss" not in metrics and "actor/kl_to_reference" in metrics
    overall, accuracy, form = (metrics[f"reward/{name}"] for name in ("mean", "accuracy", "format"))
    assert overall == pytest.approx(0.75 * accuracy + 0.25 * form, abs=1e-6)


def test_the_merged_model_is_read_by_the_evaluation_harness(place: Path) -> None:
    pytest.importorskip("lm_eval")
    merged = place / "merged"
    if not merged.is_dir():
        pytest.skip("the run whose model is merged did not end well")
    (place / "task.yaml").write_text(
        f"task: toy_sums\ndataset_path: parquet\ndataset_kwargs: {{data_files: {{test: {place}/test.parquet}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: '{{prompt}}'\n"
        "doc_to_target: '{{reward_model.ground_truth}}'\ngeneration_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={merged}",
        "--device",
        "cpu",
    ]
    command += ["--tasks", "toy_sums", "--include_path", str(place), "--limit", "4", "--batch_size", "2"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=place, env=offline, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "exact_match" in done.stdout, done.stderr[-3000:]
