"""verl's own example scripts as captured: which pass, what they mean, and that order never matters."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hybridflow.config.load import load_config
from hybridflow.config.schema import Config
from hybridflow.config.verl_keys import full_name
from hybridflow.errors import ConfigError
from tests.unit.config_cases import LOOKS_LIKE_PARQUET

SCRIPTS = Path(__file__).parents[3] / "shared/verl_overrides/examples.json"
pytestmark = pytest.mark.skipif(not SCRIPTS.exists(), reason="the captured scripts are not in ../shared/verl_overrides")
MODULES = ("main_ppo", "main_dapo", "main_entropy", "main_prime", "main_flowrl", "main_sppo", "main_spin")
OTHER_ENGINES = re.compile(r"megatron|device=npu|npu|rollout.name=trtllm|strategy=(veomni|torchtitan|automodel)")


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data file and a reward file where the scripts' are replaced by them, and modules that stand for optional packages."""
    monkeypatch.chdir(tmp_path)
    Path("data.parquet").write_bytes(LOOKS_LIKE_PARQUET)
    Path("reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n    pass\n"
    )
    Path("modules").mkdir()
    for package in ("vllm", "sglang", "wandb", "mlflow", "peft"):
        Path("modules", f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")


@cache
def scripts() -> dict[str, list[str]]:
    """The arguments of each script for FSDP, with its data, models and reward files replaced."""
    found = {}
    for name, script in json.loads(SCRIPTS.read_text()).items():
        for number, call in enumerate(script["calls"]):
            start = next((i for i, word in enumerate(call) if any(module in word for module in MODULES)), None)
            if start is not None and not OTHER_ENGINES.search(" ".join([name, *call])):
                found[f"{name}#{number}"] = [replaced(word) for word in call[start + 1 :] if not word.startswith("--")]
    return found


def replaced(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if re.search(r"data\.(train|val)_files$", key):
        value = "data.parquet"
    elif re.search(r"\.model\.(path|tokenizer_path|input_tokenizer)$", key) and value not in ("", "null"):
        value = "org/name"
    elif key.endswith("custom_reward_function.path"):
        value = "reward.py"
    return f"{key}{equals}{value}"


def outcome(arguments: list[str]) -> Config | set[str]:
    """The configuration, or what is wrong with it."""
    try:
        return load_config(None, arguments, is_dry_run=True)
    except ConfigError as error:
        return {str(found) for found in error.errors}


def shuffled(arguments: list[str], seed: int) -> list[str]:
    """In another order; of a key that is given twice the last one counts, and stays behind the first."""
    order = list(range(len(arguments)))
    random.Random(seed).shuffle(order)
    places: dict[str, Iterator[int]] = {}
    for name in {key_of(argument) for argument in arguments}:
        places[name] = iter([i for i, argument in enumerate(arguments) if key_of(argument) == name])
    return [arguments[next(places[key_of(arguments[i])])] for i in order]


def key_of(argument: str) -> str:
    return full_name(argument.partition("=")[0].lstrip("+"))


@pytest.mark.slow
def test_most_scripts_pass_and_no_refusal_is_without_advice() -> None:
    outcomes = {name: outcome(arguments) for name, arguments in scripts().items()}
    passed = [name for name, found in outcomes.items() if isinstance(found, Config)]
    assert len(scripts()) == 78 and len(passed) >= LEAST
    told = {line for found in outcomes.values() if isinstance(found, set) for line in found}
    assert not [line for line in told if "no such key" in line or "leave it out" in line.lower()]
    assert not [line for line in told if not re.search(ADVICE, line)]


LEAST = 63
ADVICE = r"[Ss]et |[Uu]se |write |needed|edit |merge |call |list |name |give |prepare |put "


@pytest.mark.parametrize("share", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_the_order_of_keys_changes_nothing(share: int) -> None:
    for number, (name, arguments) in enumerate(scripts().items()):
        if number % share == 0:
            assert outcome(shuffled(arguments, seed=number)) == outcome(arguments), name


# By hand, from the scripts and verl's defaults. microbatch: rows x (prompt + response), or the tokens that the script gives.
BY_HAND: dict[str, dict[str, object]] = {
    "gmpo_trainer/run_qwen2_5-7b_math.sh#0": {
        "algorithm.name": "gmpo",  # loss_mode=geo_mean
        "algorithm.clip": (0.4, 0.4),
        "algorithm.kl_in": "none",
        "algorithm.prompts_per_update": 256,
        "algorithm.responses_per_prompt": 5,
        "actor.tokens_per_microbatch": 16 * 2048,
        "placement.pools": {"main": "1x8", "scoring": "1x1 cpu"},
    },
    "cispo_trainer/run_cispo_qwen2_5_0_5b_gsm8k.sh#0": {
        "algorithm.name": "cispo",
        "algorithm.clip": (10.0, 0.2),
        "algorithm.kl_in": "loss",
        "algorithm.kl_coefficient": 0.001,
        "algorithm.kl_estimator": "low_var_kl",
        "algorithm.loss_aggregation": "token_mean",
        "checkpoint.every_steps": 5,
        "checkpoint.keep": 0,  # all
    },
    "gpg_trainer/run_qwen2-7b_math.sh#0": {
        "algorithm.name": "gpg",
        "algorithm.informative": "rewards",
        "algorithm.kl_in": "none",
        "algorithm.loss_aggregation": "token_mean",
        "run.total_epochs": 15,
        "run.folder": "checkpoints/verl_gpg_example_gsm8k_math/qwen2_7b_function_rm",
    },
    "gspo_trainer/test_gspo_3b_math.sh#0": {
        "algorithm.name": "gspo",
        "algorithm.clip": (0.0003, 0.0004),
        "algorithm.dual_clip": None,
        "algorithm.loss_aggregation": "sequence_mean",
        "actor.warmup_ratio": 0.05,
        "actor.weight_decay": 0.1,
        "actor.tokens_per_microbatch": 20480,  # rows are given too, but use_dynamic_bsz is true
        "reference.tokens_per_microbatch": 30720,
        "validation.temperature": 1.0,
        "validation.top_p": 0.7,
        "validation.before_training": False,
        "run.total_steps": 500,
        "placement.pools": {"main": "1x8", "scoring": "1x1 cpu"},  # nnodes is empty: verl's 1
    },
    "remax_trainer/run_qwen2.5-3b_seq_balance.sh#0": {
        "algorithm.name": "remax",
        "algorithm.kl_in": "reward",
        "algorithm.kl_estimator": "k1",
        "algorithm.kl_coefficient": 0.001,
        "algorithm.loss_aggregation": "token_mean",
        "algorithm.dual_clip": 3.0,
        "checkpoint.save_last": False,  # save_freq=-1
        "checkpoint.every_steps": 0,
    },
    "rloo_trainer/run_qwen2-7b.sh#0": {
        "algorithm.name": "rloo",
        "algorithm.kl_in": "reward",
        "algorithm.responses_per_prompt": 5,
        "algorithm.prompts_per_update": 256,
        "actor.tokens_per_microbatch": 80 * 1536,
        "reference.tokens_per_microbatch": 160 * 1536,
    },
    "reinforce_plus_plus_trainer/run_qwen2-7b_math_rf_baseline.sh#0": {
        "algorithm.name": "reinforce_plus_plus_baseline",
        "algorithm.kl_in": "reward",
        "algorithm.kl_estimator": "k1",  # kl_loss_type=mse is of the loss, which is off
        "algorithm.kl_coefficient": 0.001,
        "actor.learning_rate": 3e-6,
        "placement.pools": {"main": "1x16", "scoring": "1x1 cpu"},
    },
    "tuning/14b/qwen2-14b_grpo-lora_2_h100_fsdp_vllm.sh#0": {
        "algorithm.name": "grpo",
        "algorithm.dual_clip": 3.0,
        "algorithm.entropy_coefficient": 0.001,
        "algorithm.kl_coefficient": 0.001,
        "model.lora_rank": 32,
        "model.lora_alpha": 32.0,
        "model.sequence_parallel": 2,
        "data.shuffle": False,
        "actor.tokens_per_microbatch": 116 // 2 * 1536,  # over both ranks
        "rollout.max_model_tokens": None,  # 1536 is prompt and response
        "rollout.engine_options": {"max_num_batched_tokens": 1536, "enable_chunked_prefill": False},
    },
    "ppo_trainer/run_deepseek7b_llm_sp2.sh#0": {
        "algorithm.name": "ppo",
        "algorithm.kl_in": "none",
        "algorithm.dual_clip": 3.0,
        "algorithm.value_clip": 0.5,
        "model.sequence_parallel": 2,
        "actor.tokens_per_microbatch": 32 * 1024,
        "critic.tokens_per_microbatch": 64 * 1024,
        "rollout.tensor_parallel": 4,
    },
    "ppo_trainer/run_qwen2-7b_sglang_seq_balance.sh#0": {
        "algorithm.name": "ppo",
        "rollout.engine": "sglang",
        "rollout.tensor_parallel": 1,  # its engines have one rank each here
        "actor.tokens_per_microbatch": 24000,
        "critic.tokens_per_microbatch": 98304,
        "data.overlong_prompts": "drop",
        "trackers.names": ("console", "wandb"),
        "validation.num_samples_logged": 0,
    },
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_script_means_what_it_means_to_verl(name: str) -> None:
    config = outcome(scripts()[f"examples/{name}"])
    assert isinstance(config, Config), config
    values = {f"{section}.{key}": value for section, keys in vars(config).items() for key, value in vars(keys).items()}
    values |= {f"algorithm.{key}": value for key, value in vars(config.algorithm.options).items()}
    assert {key: values[key] for key in BY_HAND[name]} == BY_HAND[name]
