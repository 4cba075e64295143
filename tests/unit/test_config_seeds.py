"""The numbers of configuration that published texts about PPO with verl name, in verl's words and in those of our script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hybridflow.config.load import load_config
from hybridflow.config.schema import Config
from tests.unit.config_cases import LOOKS_LIKE_PARQUET, write_prompts
from tests.unit.test_config_verl import published_script

ROOT = Path(__file__).parents[2]
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
REWARD = "def compute_score(reward_input, accuracy_weight=0.75, **kwargs):\n    return {'overall': 0.0}\n"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    Path("math.parquet").write_bytes(LOOKS_LIKE_PARQUET)
    for name in ("gsm8k_reward.py", "gsm8k_reward_advanced.py"):
        Path(name).write_text(REWARD)
    Path("modules").mkdir()
    for package in ("vllm", "wandb", "peft"):
        Path("modules", f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")


def values(config: Config) -> dict[str, object]:
    found = {f"{section}.{key}": value for section, keys in vars(config).items() for key, value in vars(keys).items()}
    return found | {f"algorithm.{key}": value for key, value in vars(config.algorithm.options).items()}


VARIATIONS: dict[str, tuple[list[str], dict[str, object]]] = {
    "1.5B": (
        [
            "actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct",
            "data.train_batch_size=64",
            f"{ACTOR}.ppo_mini_batch_size=16",
        ],
        {"model.path": "Qwen/Qwen2.5-1.5B-Instruct", "data.prompts_per_step": 64, "algorithm.prompts_per_update": 16},
    ),
    "less memory": ([f"{ROLLOUT}.gpu_memory_utilization=0.3"], {"rollout.gpu_memory_utilization": 0.3}),
    "8 GPUs": (
        [
            "trainer.n_gpus_per_node=8",
            "data.train_batch_size=1024",
            f"{ACTOR}.ppo_mini_batch_size=256",
            f"{ROLLOUT}.tensor_model_parallel_size=2",
            f"{ROLLOUT}.gpu_memory_utilization=0.6",
        ],
        {"placement.pools": {"main": "1x8", "scoring": "1x1 cpu"}, "rollout.tensor_parallel": 2, "data.prompts_per_step": 1024},
    ),
    "two nodes": (
        ["trainer.nnodes=2", "trainer.n_gpus_per_node=2", "data.train_batch_size=256"],
        {"placement.pools": {"main": "2x2", "scoring": "1x1 cpu"}, "data.prompts_per_step": 256},
    ),
    "own reward": (
        ["custom_reward_function.path=gsm8k_reward.py", "custom_reward_function.name=compute_score"],
        {"reward.path": "gsm8k_reward.py", "reward.function": "compute_score"},
    ),
    "weights of the reward": (
        ["custom_reward_function.path=gsm8k_reward_advanced.py", "+custom_reward_function.reward_kwargs.accuracy_weight=0.5"],
        {"reward.path": "gsm8k_reward_advanced.py", "reward.options": {"accuracy_weight": 0.5}},
    ),
    "low rate": ([f"{ACTOR}.optim.lr=1e-7"], {"actor.learning_rate": 1e-7}),
    "high rate": (
        [f"{ACTOR}.optim.lr=1e-4", "critic.optim.lr=5e-6"],
        {"actor.learning_rate": 1e-4, "critic.learning_rate": 5e-6},
    ),
    "KL in the reward": (
        ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.001", "algorithm.kl_ctrl.type=fixed"],
        {"algorithm.kl_in": "reward", "algorithm.kl_coefficient": 0.001, "algorithm.kl_controller": "fixed"},
    ),
    "update strength": (
        [f"{ACTOR}.ppo_epochs=1", f"{ACTOR}.clip_ratio=0.2"],
        {"algorithm.epochs": 1, "algorithm.clip": (0.2, 0.2)},
    ),
    "two epochs": ([f"{ACTOR}.ppo_epochs=2"], {"algorithm.epochs": 2}),
    "LoRA": (
        [f"{ACTOR}.lora.rank=16", f"{ACTOR}.fsdp_config.param_offload=True"],
        {"model.lora_rank": 16, "model.lora_alpha": 16.0, "actor.offload_parameters": True},
    ),
    "GRPO": (
        ["algorithm.adv_estimator=grpo", f"{ROLLOUT}.n=5"],
        {"algorithm.name": "grpo", "algorithm.responses_per_prompt": 5, "algorithm.kl_in": "none"},
    ),
    "MATH added": (
        ["data.train_files=['math.parquet', 'math.parquet']", "data.max_prompt_length=1024"],
        {"data.train_files": ("math.parquet", "math.parquet"), "data.max_prompt_tokens": 1024, "data.overlong_prompts": "drop"},
    ),
    "15 epochs": (["trainer.total_epochs=15"], {"run.total_epochs": 15}),
    "critic first": (["trainer.critic_warmup=10"], {"algorithm.critic_warmup_steps": 9}),
    "microbatches in rows": (
        [f"{ACTOR}.use_dynamic_bsz=False", f"{ACTOR}.ppo_micro_batch_size_per_gpu=4"],
        {"actor.tokens_per_microbatch": 4 * (512 + 256)},
    ),
    "resumed": (
        ["trainer.resume_mode=auto", "trainer.save_freq=1"],
        {"checkpoint.resume": "auto", "checkpoint.every_steps": 1},
    ),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_a_variation_of_the_published_script(tmp_path: Path, name: str) -> None:
    changes, expected = VARIATIONS[name]
    config = load_config(None, [*published_script(tmp_path), *changes], is_dry_run=True)
    assert {key: values(config)[key] for key in expected} == expected


OURS: dict[str, tuple[dict[str, str], list[str]]] = {
    "as it is": ({}, []),
    "1.5B": ({"MODEL_PATH": "Qwen/Qwen2.5-1.5B-Instruct", "TRAIN_BATCH_SIZE": "64", "PPO_MINI_BATCH_SIZE": "16"}, []),
    "8 GPUs": (
        {
            "NUM_GPUS": "8",
            "TRAIN_BATCH_SIZE": "1024",
            "PPO_MINI_BATCH_SIZE": "256",
            "TENSOR_PARALLEL": "2",
            "GPU_MEMORY": "0.6",
        },
        [],
    ),
    "KL in the reward": ({}, ["algorithm.kl_in=reward", "algorithm.kl_coefficient=0.001"]),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bash")
@pytest.mark.parametrize("name", OURS)
def test_our_own_script_means_the_same(tmp_path: Path, name: str) -> None:
    """What is learned, that is: folders, trackers and sizes of microbatches are each one's own."""
    variables, changes = OURS[name]
    write_prompts(tmp_path / "train.parquet")
    files = {
        "TRAIN_FILES": f"{tmp_path}/train.parquet",
        "VALIDATION_FILES": f"{tmp_path}/train.parquet",
        "PYTHON": sys.executable,
    }
    paths = os.pathsep.join([str(ROOT), str(tmp_path / "modules")])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | files | variables
    command = ["bash", str(ROOT / "examples/ppo_gsm8k_single_gpu.sh"), *changes, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout.partition("\n\n")[0].partition("\nactor on pool")[0])
    verls = load_config(None, [*published_script(tmp_path), *VARIATIONS.get(name, ([], {}))[0]], is_dry_run=True)
    for section in ("algorithm", "data", "rollout", "placement"):
        mine = {f"{section}.{key}": value for key, value in resolved[section].items()}
        theirs = {key: list(value) if isinstance(value, tuple) else value for key, value in values(verls).items()}
        assert {key: theirs[key] for key in mine if key in theirs} == mine
