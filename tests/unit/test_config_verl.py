"""verl's keys: scripts written for it load, and what has no equivalent is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.config.build import keys_of
from hybridflow.config.load import load_config
from hybridflow.config.schema import Config
from hybridflow.config.settings import KNOWN_KEYS
from hybridflow.config.verl_keys import KEYS, PREFIXES
from tests.unit.config_cases import LOOKS_LIKE_PARQUET, mistakes_of, right_run

# The arguments of a published single-GPU script for verl's PPO on GSM8K, with its variables filled in.
PUBLISHED_SCRIPT = [
    "algorithm.adv_estimator=gae",
    "data.train_files=['{folder}/train.parquet']",
    "data.val_files=['{folder}/train.parquet']",
    "data.train_batch_size=128",
    "data.max_prompt_length=512",
    "data.max_response_length=256",
    "data.filter_overlong_prompts=True",
    "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    "actor_rollout_ref.actor.optim.lr=1e-6",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384",
    "actor_rollout_ref.actor.entropy_coeff=0",
    "actor_rollout_ref.actor.clip_ratio=0.2",
    "actor_rollout_ref.actor.fsdp_config.param_offload=False",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=False",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
    "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=16384",
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu=16384",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "critic.model.path=Qwen/Qwen2.5-0.5B-Instruct",
    "critic.model.use_remove_padding=True",
    "critic.model.enable_gradient_checkpointing=True",
    "critic.optim.lr=1e-5",
    "critic.use_dynamic_bsz=True",
    "critic.ppo_max_token_len_per_gpu=16384",
    "critic.fsdp.param_offload=False",
    "critic.fsdp.optimizer_offload=False",
    "trainer.balance_batch=True",
    "trainer.critic_warmup=0",
    'trainer.logger=["console","wandb"]',
    "trainer.project_name=verl_ppo_gsm8k",
    "trainer.experiment_name=qwen2.5_0.5b_ppo_gsm8k_20261121_0930",
    "trainer.n_gpus_per_node=1",
    "trainer.nnodes=1",
    "trainer.save_freq=20",
    "trainer.test_freq=5",
    "trainer.total_epochs=20",
]

# Values as a published report of a run on one GPU lists them, in its short forms.
PUBLISHED_REPORT = """
train_batch_size: 64
max_prompt_length: 512
max_response_length: 512
actor.optim.lr: 1e-6
actor.ppo_mini_batch_size: 32
actor.ppo_micro_batch_size_per_gpu: 4
critic.optim.lr: 1e-5
algorithm.kl_ctrl.kl_coef: 0.001
rollout.gpu_memory_utilization: 0.75
total_epochs: 1
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU, and modules that stand for vLLM and Weights & Biases."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "modules").mkdir()
    for package in ("vllm", "wandb"):
        (tmp_path / "modules" / f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")


def published_script(folder: Path) -> list[str]:
    (folder / "train.parquet").write_bytes(LOOKS_LIKE_PARQUET)
    return [argument.format(folder=folder) for argument in PUBLISHED_SCRIPT]


def loaded(folder: Path, *overrides: str) -> Config:
    return load_config(None, [*right_run(folder), *overrides])


def option(config: Config, name: str) -> object:
    return vars(config.algorithm.options)[name]


def test_a_published_script_loads_with_the_values_it_gives(tmp_path: Path) -> None:
    config = load_config(None, published_script(tmp_path))
    assert config.algorithm.name == "ppo"
    assert config.data.train_files == (f"{tmp_path}/train.parquet",)
    assert (config.data.prompts_per_step, config.data.max_prompt_tokens, config.data.max_response_tokens) == (128, 512, 256)
    assert (config.model.path, config.model.gradient_checkpointing) == ("Qwen/Qwen2.5-0.5B-Instruct", True)
    assert (config.actor.learning_rate, config.critic.learning_rate) == (1e-6, 1e-5)
    assert (option(config, "prompts_per_update"), option(config, "clip")) == (64, (0.2, 0.2))
    assert (config.rollout.engine, config.rollout.gpu_memory_utilization) == ("vllm", 0.4)
    assert (config.reference.offload_parameters, config.actor.offload_parameters) == (True, False)
    assert config.trackers.names == ("console", "wandb")
    assert config.run.folder == "outputs/qwen2.5_0.5b_ppo_gsm8k_20261121_0930"
    assert (config.checkpoint.every_steps, config.validation.every_steps, config.run.total_epochs) == (20, 5, 20)


def test_the_same_script_loads_with_the_changes_it_suggests(tmp_path: Path) -> None:
    script = published_script(tmp_path)
    kl = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.01", "algorithm.kl_ctrl.type=fixed"]
    config = load_config(None, [*script, *kl, "actor_rollout_ref.actor.lora.rank=16", "actor_rollout_ref.actor.ppo_epochs=2"])
    assert (option(config, "kl_in"), option(config, "kl_coefficient"), option(config, "epochs")) == ("reward", 0.01, 2)
    assert config.model.lora_rank == 16
    config = load_config(None, [*script, "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8"])
    assert (config.algorithm.name, option(config, "responses_per_prompt")) == ("grpo", 8)


def test_the_short_forms_of_a_published_report_load_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(PUBLISHED_REPORT)
    config = load_config(str(tmp_path / "run.yaml"), right_run(tmp_path))
    assert (config.data.prompts_per_step, option(config, "prompts_per_update")) == (64, 32)
    assert config.actor.tokens_per_microbatch == 4 * (512 + 512)
    assert (config.rollout.gpu_memory_utilization, option(config, "kl_coefficient")) == (0.75, 0.001)


def test_every_key_of_the_table_leads_to_keys_that_exist() -> None:
    grpo_and_ppo = {"name"}
    from hybridflow.config.load import load_algorithm

    for name in ("ppo", "grpo"):
        grpo_and_ppo |= set(keys_of(load_algorithm(name).config_class))
    known = {*KNOWN_KEYS, *(f"algorithm.{key}" for key in grpo_and_ppo)}
    for key, translation in KEYS.items():
        for target in translation.becomes.split("`")[1::2]:
            is_entry = target.startswith(("placement.pools.", "rollout.engine_options."))
            assert target in known or is_entry, f"{key} becomes {target}, which does not exist"
    assert all(ours.removesuffix(".") in known for ours in PREFIXES.values())


def test_no_key_of_ours_is_shadowed_by_one_of_verls() -> None:
    assert not KEYS.keys() & set(KNOWN_KEYS)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.save_freq=-1", "checkpoint.every_steps", 0),
        ("data.truncation=left", "data.overlong_prompts", "truncate_left"),
        ("data.filter_overlong_prompts=False", "data.overlong_prompts", "error"),
        ("actor_rollout_ref.rollout.top_k=-1", "rollout.top_k", 0),
        ("actor_rollout_ref.rollout.val_kwargs.do_sample=False", "validation.temperature", 0.0),
        ("actor_rollout_ref.rollout.free_cache_engine=False", "rollout.sleep", False),
        ("actor_rollout_ref.rollout.free_cache_engine=True", "rollout.sleep", "auto"),
        ("actor_rollout_ref.rollout.name=hf", "rollout.engine", "torch"),
        ("trainer.resume_mode=disable", "checkpoint.resume", "never"),
        ("custom_reward_function.reward_kwargs.weight=2", "reward.options", {"weight": 2}),
        ("custom_reward_function.reward_kwargs={weight: 2}", "reward.options", {"weight": 2}),
        ("+ray_init.num_cpus=6", "placement.cpu_slots", 6),
        ("trainer.default_local_dir=elsewhere", "run.folder", "elsewhere"),
    ],
)
def test_a_value_is_carried_over(tmp_path: Path, override: str, key: str, value: object) -> None:
    section, _, name = key.partition(".")
    own_function = "reward.name=json:loads"  # which is not asked for its options here
    assert vars(vars(loaded(tmp_path, override, own_function))[section])[name] == value


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("actor_rollout_ref.actor.clip_ratio=0.3", "clip", (0.3, 0.3)),
        ("actor_rollout_ref.actor.clip_ratio_high=0.28", "clip", (0.2, 0.28)),
        ("actor_rollout_ref.actor.clip_ratio_low=0.1", "clip", (0.1, 0.2)),
        ("algorithm.lam=0.95", "gae_lambda", 0.95),
        ("algorithm.kl_penalty=low_var_kl", "kl_estimator", "k3"),
        ("algorithm.use_kl_in_reward=False", "kl_in", "none"),
        ("actor_rollout_ref.actor.use_kl_loss=True", "kl_in", "loss"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "loss_aggregation", "sequence_mean"),
        ("trainer.critic_warmup=5", "critic_warmup_steps", 5),
    ],
)
def test_an_option_of_ppo_is_carried_over(tmp_path: Path, override: str, name: str, value: object) -> None:
    assert option(loaded(tmp_path, override), name) == value


@pytest.mark.parametrize("order", [1, -1])
def test_two_keys_that_make_one_may_come_in_any_order(tmp_path: Path, order: int) -> None:
    pairs = [
        ["trainer.nnodes=2", "trainer.n_gpus_per_node=8"],
        ["actor_rollout_ref.actor.clip_ratio_low=0.1", "actor_rollout_ref.actor.clip_ratio_high=0.3"],
        ["data.truncation=error", "data.filter_overlong_prompts=True"],
        ["algorithm.use_kl_in_reward=False", "actor_rollout_ref.actor.use_kl_loss=True"],
        ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}"],
        ["trainer.experiment_name=named", "trainer.default_local_dir=elsewhere"],
    ]
    config = loaded(tmp_path, "run.ray_address=auto", *(key for pair in pairs for key in pair[::order]))
    assert config.placement.pools["main"] == "2x8"
    assert (option(config, "clip"), option(config, "kl_in")) == ((0.1, 0.3), "loss")
    assert (config.data.overlong_prompts, config.checkpoint.resume) == ("drop", str(tmp_path))
    assert (config.trackers.run_name, config.run.folder) == ("named", "elsewhere")


def test_verls_file_loads_and_its_interpolations_may_name_its_keys(tmp_path: Path) -> None:
    text = "actor_rollout_ref:\n  model:\n    path: some/model\n  actor: {ppo_mini_batch_size: '${data.train_batch_size}'}\n"
    (tmp_path / "verl.yaml").write_text(
        f"data: {{train_batch_size: 96}}\n{text}critic: {{model: {{path: '${{model.path}}'}}}}\n"
    )
    overrides = [argument for argument in right_run(tmp_path) if not argument.startswith("model.path")]
    config = load_config(str(tmp_path / "verl.yaml"), overrides)
    assert (config.model.path, config.critic.path) == ("some/model", "some/model")
    assert option(config, "prompts_per_update") == 96


def test_our_key_on_the_command_line_wins_over_verls_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "verl.yaml").write_text("data: {train_batch_size: 96}\n")
    config = load_config(str(tmp_path / "verl.yaml"), [*right_run(tmp_path), "data.prompts_per_step=32"])
    assert config.data.prompts_per_step == 32


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("actor_rollout_ref.model.use_remove_padding=False", "found False; only True is possible: rows are packed"),
        ("actor_rollout_ref.actor.use_dynamic_bsz=False", "found False; only True is possible: microbatches are cut by tokens"),
        ("trainer.balance_batch=False", "found False; only True is possible: rows go to ranks balanced by tokens"),
        ("reward_model.enable=True", "found True; only False is possible: rewards come from rules and functions"),
        ("actor_rollout_ref.actor.strategy=megatron", "only 'fsdp' or 'fsdp2' is possible: training runs on FSDP2"),
        ("algorithm.adv_estimator=rloo", "verl's 'rloo' has no equivalent here; allowed: gae, grpo"),
        ("data.image_key=images", "no equivalent here: prompts are text; leave it out"),
        ("actor_rollout_ref.actor.megatron.seed=1", "no equivalent here: leave it out. docs/configuration.md lists"),
        (
            "actor_rollout_ref.rollout.gpu_memory_utilisation=0.5",
            "Did you mean 'actor_rollout_ref.rollout.gpu_memory_utilization'?",
        ),
        ("data.train_batchsize=3", "no such key; did you mean 'data.train_batch_size'?"),
        ("trainer.nnodes=0", "found 0 (integer); needed: an integer of at least 1"),
    ],
)
def test_what_has_no_equivalent_is_a_mistake_that_says_what_to_do(tmp_path: Path, override: str, problem: str) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), override])
    assert found.startswith(f"command line: {override.partition('=')[0]}: ")
    assert problem in found


@pytest.mark.parametrize(
    "key",
    [
        "data.val_batch_size",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size",
        "actor_rollout_ref.ref.log_prob_micro_batch_size",
        "trainer.use_legacy_worker_impl",
    ],
)
def test_a_key_that_changes_nothing_here_is_accepted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    assert loaded(tmp_path, f"{key}=16") == loaded(tmp_path)
    (warning,) = caplog.messages
    assert warning.startswith(f"command line: {key}: verl's key changes nothing here: ")
    caplog.clear()
    loaded(tmp_path, f"{key}=null")
    assert not caplog.messages


def test_rows_of_a_microbatch_of_the_reference_become_tokens(tmp_path: Path) -> None:
    lengths = ["data.max_prompt_length=100", "data.max_response_length=28"]
    config = loaded(tmp_path, *lengths, "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4")
    assert config.reference.tokens_per_microbatch == 4 * (100 + 28)


def test_a_mistake_in_a_translated_key_names_both(tmp_path: Path) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), "data.train_batch_size=0"])
    assert found.startswith("command line (data.train_batch_size): data.prompts_per_step: found 0")


def test_models_that_share_a_setting_must_agree_on_it(tmp_path: Path) -> None:
    ours, critics = (
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "critic.model.enable_gradient_checkpointing=False",
    )
    (found,) = mistakes_of([*right_run(tmp_path), ours, critics])
    assert "found False, but model.gradient_checkpointing is True, one for all models" in found


def test_the_kl_counts_once(tmp_path: Path) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), "actor.use_kl_loss=True", "algorithm.use_kl_in_reward=True"])
    assert "are both True, but the KL counts once" in found


@pytest.mark.parametrize("order", [1, -1])
def test_verls_two_estimators_of_the_kl_count_where_the_kl_is(tmp_path: Path, order: int) -> None:
    both = ["algorithm.kl_penalty=kl", "actor.kl_loss_type=mse", "algorithm.use_kl_in_reward=False"]
    config = loaded(tmp_path, *[*both, "actor.use_kl_loss=True"][::order])
    assert (option(config, "kl_in"), option(config, "kl_estimator")) == ("loss", "k2")
    config = loaded(tmp_path, *["algorithm.kl_penalty=kl", "actor.use_kl_loss=True"][::order])
    assert option(config, "kl_estimator") == "k3", "verl's default in the loss is low_var_kl"
    config = loaded(tmp_path, *["algorithm.kl_penalty=kl", "actor.kl_loss_type=mse"][::order])
    assert (option(config, "kl_in"), option(config, "kl_estimator")) == ("reward", "k1")


def test_grpo_has_its_kl_in_the_loss(tmp_path: Path) -> None:
    usual = [
        "algorithm.adv_estimator=grpo",
        "algorithm.use_kl_in_reward=False",
        "actor.use_kl_loss=True",
        "actor.kl_loss_coef=0.01",
    ]
    config = loaded(tmp_path, *usual, "actor.kl_loss_type=low_var_kl", "trainer.critic_warmup=0")
    assert option(config, "kl_coefficient") == 0.01
    config = loaded(tmp_path, "algorithm.adv_estimator=grpo", "actor.use_kl_loss=False", "actor.kl_loss_coef=0.01")
    assert option(config, "kl_coefficient") == 0.0
