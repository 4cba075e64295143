"""verl's keys: scripts written for it load, and what has no equivalent is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybridflow.config.build import keys_of
from hybridflow.config.load import load_algorithm, load_config
from hybridflow.config.schema import Config
from hybridflow.config.settings import KNOWN_KEYS
from hybridflow.config.verl_keys import KEYS
from hybridflow.config.verl_rules import RULES
from hybridflow.config.verl_values import CONVERSIONS
from hybridflow.registry import ALGORITHMS
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
    for package in ("vllm", "wandb", "peft"):
        (tmp_path / "modules" / f"{package}.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "modules")


def published_script(folder: Path) -> list[str]:
    (folder / "train.parquet").write_bytes(LOOKS_LIKE_PARQUET)
    return [argument.format(folder=folder) for argument in PUBLISHED_SCRIPT]


BUFFER = "reward_model.reward_kwargs.overlong_buffer_cfg"
FITTING = ["trainer.n_gpus_per_node=1", "data.train_batch_size=256", "trainer.logger=console"]
"""verl's keys that make its defaults fit a machine with one rank."""


def loaded(folder: Path, *overrides: str, bare: tuple[str, ...] = ()) -> Config:
    """With verl's defaults; `bare` leaves keys out that would win over verl's."""
    fitting = [*right_run(folder), "placement.pools.main=1x1", "data.train_batch_size=256"]
    return load_config(None, [*(key for key in fitting if not key.startswith(bare or ("-",))), *overrides])


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
    assert config.run.folder == "checkpoints/verl_ppo_gsm8k/qwen2.5_0.5b_ppo_gsm8k_20261121_0930"
    assert (config.checkpoint.every_steps, config.validation.every_steps, config.run.total_epochs) == (20, 5, 20)


def test_what_it_leaves_out_has_verls_default_and_one_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(None, published_script(tmp_path))
    assert (option(config, "kl_in"), option(config, "dual_clip")) == ("none", 3.0)
    assert (config.model.lora_alpha, config.checkpoint.keep, config.validation.num_samples_logged) == (16.0, 0, 0)
    (line,) = [message for message in caplog.messages if "has verl's default, not ours" in message]
    assert "algorithm.dual_clip=3" in line and "checkpoint.keep=0" in line


def test_a_single_key_of_verls_brings_all_of_its_defaults(tmp_path: Path) -> None:
    elsewhere = ["run.device=auto", "rollout.engine=vllm", "run.ray_address=auto"]
    config = load_config(None, ["data.train_batch_size=1024", *right_run(tmp_path), *elsewhere])
    assert (config.run.total_epochs, config.data.overlong_prompts, option(config, "prompts_per_update")) == (30, "error", 256)
    assert (config.placement.pools["main"], config.rollout.tensor_parallel) == ("1x8", 2)
    assert (config.checkpoint.every_steps, config.checkpoint.save_last, config.validation.every_steps) == (0, False, 0)
    assert config.run.folder == "checkpoints/verl_examples/gsm8k"


def test_without_any_key_of_verls_the_defaults_are_ours(tmp_path: Path) -> None:
    config = load_config(None, [*right_run(tmp_path), "algorithm.gamma=0.9", "data.shuffle=false", "rollout.top_p=1.0"])
    assert (config.run.total_epochs, config.model.lora_alpha, option(config, "dual_clip")) == (1, 32.0, None)


def test_a_file_of_ours_keeps_what_it_says_and_the_machine(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "actor: {learning_rate: 1.0e-4}\nalgorithm: {name: ppo, kl_in: loss, kl_estimator: k2}\n"
    )
    config = load_config(str(tmp_path / "run.yaml"), [*right_run(tmp_path), "trainer.total_epochs=3", "train_batch_size=256"])
    assert (config.actor.learning_rate, option(config, "kl_in"), config.run.total_epochs) == (1e-4, "loss", 3)
    assert (config.placement.pools["main"], config.run.folder) == ("1x1", "outputs/run")
    assert option(config, "dual_clip") == 3.0


def test_the_same_script_loads_with_the_changes_it_suggests(tmp_path: Path) -> None:
    script = published_script(tmp_path)
    kl = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=0.01", "algorithm.kl_ctrl.type=fixed"]
    config = load_config(None, [*script, *kl, "actor_rollout_ref.actor.lora.rank=16", "actor_rollout_ref.actor.ppo_epochs=2"])
    assert (option(config, "kl_in"), option(config, "kl_coefficient"), option(config, "epochs")) == ("reward", 0.01, 2)
    assert (config.model.lora_rank, config.model.lora_alpha) == (16, 16.0)
    config = load_config(None, [*script, "algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8"])
    assert (config.algorithm.name, option(config, "responses_per_prompt")) == ("grpo", 8)


def test_the_short_forms_of_a_published_report_load_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(PUBLISHED_REPORT)
    config = load_config(str(tmp_path / "run.yaml"), right_run(tmp_path))
    assert (config.data.prompts_per_step, option(config, "prompts_per_update")) == (64, 32)
    assert config.actor.tokens_per_microbatch == 4 * (512 + 512)
    assert (config.rollout.gpu_memory_utilization, config.run.total_epochs) == (0.75, 1)


def test_every_line_of_the_table_leads_to_keys_and_functions_that_exist() -> None:
    options = {option for name in ALGORITHMS for option in keys_of(load_algorithm(name).config_class)} | {"name"}
    known = {*KNOWN_KEYS, *(f"algorithm.{option}" for option in options)}
    for key in KEYS.values():
        is_rule = key.how.startswith("@") and key.how[1:] in RULES
        assert is_rule or key.how in CONVERSIONS or key.how in ("=", "-", "only", "same"), key
        if key.how not in ("-", "only", "@hydra_defaults", "@reward_manager"):
            for target in key.ours.split(", "):
                is_entry = target.startswith(("placement.pools.", "rollout.engine_options."))
                assert target in known or is_entry, f"{key.name} becomes {target}, which does not exist"
        assert key.words or key.how not in ("-", "only"), f"{key.name} has no word of what to do"


def test_no_key_of_ours_is_shadowed_by_one_of_verls() -> None:
    same = {"data.train_files", "data.shuffle"}
    assert KEYS.keys() & set(KNOWN_KEYS) == same and all(KEYS[key].ours == key for key in same)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("trainer.save_freq=-1", "checkpoint.every_steps", 0),
        ("trainer.save_freq=-1", "checkpoint.save_last", False),
        ("trainer.save_freq=5", "checkpoint.save_last", True),
        ("data.truncation=left", "data.overlong_prompts", "truncate_left"),
        ("data.filter_overlong_prompts=False", "data.overlong_prompts", "error"),
        ("actor_rollout_ref.rollout.top_k=-1", "rollout.top_k", 0),
        ("actor_rollout_ref.rollout.val_kwargs.do_sample=False", "validation.temperature", 0.0),
        ("actor_rollout_ref.rollout.val_kwargs.temperature=0.7", "validation.temperature", 0.7),
        ("actor_rollout_ref.rollout.free_cache_engine=False", "rollout.sleep", False),
        ("actor_rollout_ref.rollout.free_cache_engine=True", "rollout.sleep", "auto"),
        ("trainer.resume_mode=disable", "checkpoint.resume", "never"),
        ("custom_reward_function.reward_kwargs.weight=2", "reward.options", {"weight": 2}),
        ("custom_reward_function.reward_kwargs={weight: 2}", "reward.options", {"weight": 2}),
        ("reward.custom_reward_function.reward_kwargs.weight=2", "reward.options", {"weight": 2}),
        ("reward.num_workers=6", "reward.num_processes", 6),
        ("+ray_init.num_cpus=6", "placement.cpu_slots", 6),
        ("++ray_kwargs.ray_init.num_cpus=6", "placement.cpu_slots", 6),
        ("trainer.default_local_dir=elsewhere", "run.folder", "elsewhere"),
        ("trainer.experiment_name=mine", "run.folder", "checkpoints/verl_examples/mine"),
        ("actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=0.1", "actor.warmup_ratio", 0.1),
        ("critic.optim.lr_warmup_steps=7", "critic.warmup_steps", 7),
        ("actor_rollout_ref.actor.optim.lr_scheduler_type=cosine", "actor.schedule", "cosine"),
        ("trainer.logger=console", "trackers.names", ("console",)),
        ("actor_rollout_ref.model.lora.target_modules=[q_proj]", "model.lora_targets", ("q_proj",)),
        ("actor_rollout_ref.rollout.update_weights_bucket_megabytes=64", "rollout.sync_bucket_mib", 64),
        ("critic.ulysses_sequence_parallel_size=1", "model.sequence_parallel", 1),
    ],
)
def test_a_value_is_carried_over(tmp_path: Path, override: str, key: str, value: object) -> None:
    section, _, name = key.partition(".")
    own_function = "reward.name=json:loads"  # which is not asked for its options here
    assert vars(vars(loaded(tmp_path, override, own_function, bare=("trackers.names",)))[section])[name] == value


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("actor_rollout_ref.actor.clip_ratio=0.3", "clip", (0.3, 0.3)),
        ("actor_rollout_ref.actor.clip_ratio_high=0.28", "clip", (0.2, 0.28)),
        ("actor_rollout_ref.actor.clip_ratio_low=0.1", "clip", (0.1, 0.2)),
        ("actor_rollout_ref.actor.clip_ratio_c=10.0", "dual_clip", 10.0),
        ("actor_rollout_ref.actor.tis_imp_ratio_cap=2", "importance_cap", 2.0),
        ("algorithm.lam=0.95", "gae_lambda", 0.95),
        ("algorithm.use_kl_in_reward=False", "kl_in", "none"),
        ("actor_rollout_ref.actor.use_kl_loss=True", "kl_in", "loss"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean", "loss_aggregation", "sequence_mean"),
        ("actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum", "value_loss_aggregation", "sequence_mean_of_sums"),
        # verl's actor learns in the step that has this number, and in those after it; its first step is 1.
        ("trainer.critic_warmup=5", "critic_warmup_steps", 4),
        ("trainer.critic_warmup=0", "critic_warmup_steps", 0),
        ("algorithm.rollout_correction.rollout_is=sequence", "importance_level", "sequence"),
        ("algorithm.rollout_correction.bypass_mode=True", "old_log_probs", "rollout"),
    ],
)
def test_an_option_of_ppo_is_carried_over(tmp_path: Path, override: str, name: str, value: object) -> None:
    assert option(loaded(tmp_path, override), name) == value


@pytest.mark.parametrize(
    ("overrides", "name", "options"),
    [
        ("adv_estimator=rloo algorithm.use_kl_in_reward=True", "rloo", {"kl_in": "reward", "loss_aggregation": "token_mean"}),
        ("adv_estimator=remax", "remax", {"kl_in": "none", "dual_clip": 3.0}),
        ("adv_estimator=reinforce_plus_plus", "reinforce_plus_plus", {"gamma": 1.0}),
        ("adv_estimator=reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline", {"kl_in": "none"}),
        ("adv_estimator=opo", "opo", {"dual_clip": 3.0}),
        ("adv_estimator=grpo_passk", "grpo_pass_at_k", {"scale_by_std": True}),
        ("adv_estimator=gpg actor.policy_loss.loss_mode=gpg", "gpg", {"informative": "rewards"}),
        ("adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=False", "grpo", {"scale_by_std": False}),
        (
            "adv_estimator=grpo actor.policy_loss.loss_mode=gspo",
            "gspo",
            {"dual_clip": None, "loss_aggregation": "token_mean"},  # verl 0.9: by loss_agg_mode
        ),
        ("adv_estimator=grpo actor.policy_loss.loss_mode=geo_mean actor.clip_ratio_high=0.4", "gmpo", {"clip": (0.2, 0.4)}),
        ("adv_estimator=grpo actor.policy_loss.loss_mode=cispo actor.clip_ratio_low=10", "cispo", {"clip": (10.0, 0.2)}),
        ("adv_estimator=grpo actor.policy_loss.loss_mode=sapo", "sapo", {"tau_negative": 1.05}),
        ("adv_estimator=grpo actor.policy_loss.loss_mode=dppo_kl", "dppo", {"divergence": "kl", "ratio_cap": 3.0}),
        ("adv_estimator=gdpo algorithm.gdpo_reward_keys=[a,b]", "gdpo", {"rewards": ("a", "b"), "reward_weights": ()}),
        ("adv_estimator=grpo actor.policy_loss.loss_mode=kl-cov", "kl_cov", {"share": 2e-4, "covariance_kl": 0.1}),
        ("adv_estimator=grpo actor.policy_loss.loss_mode=clip_cov", "clip_cov", {"bounds": (1.0, 5.0), "share": 2e-4}),
        (
            "adv_estimator=grpo algorithm.filter_groups.enable=True algorithm.filter_groups.max_num_gen_batches=7",
            "dapo",
            {"dynamic_sampling": True, "max_rounds": 7, "overlong_penalty": 0.0},
        ),
        (
            "adv_estimator=grpo reward_model.reward_manager=dapo "
            f"{BUFFER}.enable=True {BUFFER}.len=64 {BUFFER}.penalty_factor=0.5",
            "dapo",
            {"dynamic_sampling": False, "overlong_buffer_tokens": 64, "overlong_penalty": 0.5},
        ),
    ],
)
def test_advantages_and_loss_make_an_algorithm(tmp_path: Path, overrides: str, name: str, options: dict[str, object]) -> None:
    config = loaded(tmp_path, *f"algorithm.{overrides} actor_rollout_ref.rollout.n=4".split())
    assert config.algorithm.name == name
    assert {key: option(config, key) for key in options} == options


@pytest.mark.parametrize("order", [1, -1])
def test_keys_that_belong_together_may_come_in_any_order(tmp_path: Path, order: int) -> None:
    pairs = [
        ["trainer.nnodes=2", "trainer.n_gpus_per_node=8"],
        ["actor_rollout_ref.actor.clip_ratio_low=0.1", "actor_rollout_ref.actor.clip_ratio_high=0.3", "actor.clip_ratio=0.2"],
        ["data.truncation=left", "data.filter_overlong_prompts=True"],
        ["algorithm.use_kl_in_reward=False", "actor_rollout_ref.actor.use_kl_loss=True", "algorithm.kl_ctrl.kl_coef=0.0"],
        ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={tmp_path}"],
        ["trainer.experiment_name=named", "trainer.default_local_dir=elsewhere"],
    ]
    keys = [key for pair in pairs for key in pair][::order]
    config = loaded(tmp_path, "run.ray_address=auto", *keys, bare=("placement.pools.main",))
    assert config.placement.pools["main"] == "2x8"
    assert (option(config, "clip"), option(config, "kl_in"), option(config, "kl_coefficient")) == ((0.1, 0.3), "loss", 0.001)
    assert (config.data.overlong_prompts, config.checkpoint.resume) == ("drop", str(tmp_path))
    assert (config.trackers.run_name, config.run.folder) == ("named", "elsewhere")


@pytest.mark.parametrize(
    ("keys", "kl_in", "coefficient", "estimator"),
    [
        ("actor.use_kl_loss=True actor.kl_loss_coef=0.04 algorithm.kl_ctrl.kl_coef=0.001", "loss", 0.04, "low_var_kl"),
        ("actor.use_kl_loss=True actor.kl_loss_type=mse algorithm.kl_penalty=kl", "loss", 0.001, "k2"),
        ("algorithm.use_kl_in_reward=True actor.kl_loss_type=mse actor.kl_loss_coef=0.5", "reward", 0.001, "k1"),
        (
            "algorithm.use_kl_in_reward=True algorithm.kl_penalty=low_var_kl+ algorithm.kl_ctrl.kl_coef=0.2",
            "reward",
            0.2,
            "low_var_kl+",
        ),
        ("actor.use_kl_loss=False algorithm.use_kl_in_reward=False algorithm.kl_ctrl.kl_coef=0.5", "none", 0.001, "k1"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_kl_is_where_its_switch_says_with_the_numbers_of_that_place(
    tmp_path: Path, keys: str, kl_in: str, coefficient: float, estimator: str, order: int
) -> None:
    config = loaded(tmp_path, *keys.split()[::order])
    found = option(config, "kl_in"), option(config, "kl_coefficient"), option(config, "kl_estimator")
    assert found == (kl_in, coefficient, estimator)


def test_verls_file_loads_and_its_interpolations_may_name_its_keys(tmp_path: Path) -> None:
    text = "actor_rollout_ref:\n  model:\n    path: some/model\n  actor: {ppo_mini_batch_size: '${data.train_batch_size}'}\n"
    (tmp_path / "verl.yaml").write_text(
        "hydra: {searchpath: ['file://verl/trainer/config']}\ndefaults: [ppo_trainer, _self_]\n"
        f"data: {{train_batch_size: 96}}\n{text}critic: {{model: {{path: '${{model.path}}'}}}}\n"
        "trainer: {experiment_name: '${trainer.project_name}_1'}\n"
    )
    overrides = [argument for argument in right_run(tmp_path) if not argument.startswith("model.path")]
    config = load_config(str(tmp_path / "verl.yaml"), overrides)
    assert (config.model.path, config.critic.path) == ("some/model", "some/model")
    assert (option(config, "prompts_per_update"), config.trackers.run_name) == (96, "verl_examples_1")


def test_our_key_on_the_command_line_wins_over_verls_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "verl.yaml").write_text("data: {train_batch_size: 96}\nactor: {ppo_mini_batch_size: 32}\n")
    config = load_config(str(tmp_path / "verl.yaml"), [*right_run(tmp_path), "data.prompts_per_step=32"])
    assert config.data.prompts_per_step == 32


def test_verls_key_on_the_command_line_wins_over_ours_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("algorithm: {name: grpo, responses_per_prompt: 4}\ndata: {prompts_per_step: 8}\n")
    overrides = ["algorithm.adv_estimator=gae", "train_batch_size=16", "actor.ppo_mini_batch_size=16"]
    config = load_config(str(tmp_path / "run.yaml"), [*right_run(tmp_path), *overrides])
    assert (config.algorithm.name, config.data.prompts_per_step) == ("ppo", 16)
    assert option(config, "responses_per_prompt") == 1, "GRPO's option went with GRPO"


def test_a_tilde_takes_a_key_out_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "verl.yaml").write_text("actor_rollout_ref: {actor: {use_kl_loss: true}, model: {override_config: {a: 1}}}\n")
    overrides = [*right_run(tmp_path), "train_batch_size=256"]
    taken = ["~actor_rollout_ref.actor.use_kl_loss", "~actor_rollout_ref.model.override_config"]
    assert option(load_config(str(tmp_path / "verl.yaml"), [*overrides, *taken]), "kl_in") == "none"
    assert mistakes_of(overrides, str(tmp_path / "verl.yaml"))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "actor_rollout_ref.actor.strategy=megatron",
            "only 'fsdp' has an equivalent here: training runs on FSDP2: set it to fsdp",
        ),
        ("algorithm.adv_estimator=optimal_token_baseline", "no algorithm here has the advantages of 'optimal_token_baseline'"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=gspo", "there are gae, grpo"),
        ("actor_rollout_ref.actor.megatron.seed=1", "training runs on FSDP2"),
        ("actor_rollout_ref.rollout.multi_turn.function_tool_path=x.py", "write the functions as a ToolEnvironment"),
        ("model.partial_pretrain=org/name", "of verl's supervised trainer: set model.path and algorithm=sft"),
        ("reward_model.prime_model.loss_type=ce", "write it as an algorithm"),
        ("actor_rollout_ref.model.override_config.rope_theta=1", "edit config.json in a copy of the model's folder"),
        ("actor_rollout_ref.rollout.do_sample=False", "set it to True"),
        ("algorithm.kl_penalty=full algorithm.use_kl_in_reward=True", "found 'full'; allowed: kl, k1, mse"),
        ("reward_model.reward_manager=collabllm", "Name the function that scores instead"),
        ("trainer.default_hdfs_dir=hdfs://x", "mount the store"),
        ("trainer.logger=swanlab", "a class of your own, as my_package.module:Class"),
        ("data.truncation=middle", "Set it to left or error"),
        (
            "actor_rollout_ref.rollout.gpu_memory_utilisation=0.5",
            "Did you mean 'actor_rollout_ref.rollout.gpu_memory_utilization'?",
        ),
        ("actor_rollout_ref.rollout.brand_new.feature=7", "is not known here"),
        ("trainer.nnodes=0", "found 0 (integer); needed: an integer of at least 1"),
        ("critic.ppo_epochs=2", "algorithm.epochs is 1, actor and critic learn from the same rows. Set it to 1"),
        ("group@package=name", "groups of Hydra's are not read"),
    ],
)
def test_what_has_no_equivalent_is_a_mistake_that_says_what_to_do(tmp_path: Path, override: str, problem: str) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, *override.split()])
    assert found.startswith(f"command line: {override.partition('=')[0]}: ")
    assert problem in found and "no such key" not in found


def test_an_unknown_key_in_a_section_of_both_is_not_called_unknown_to_us_alone(tmp_path: Path) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, "data.brand_new=7"])
    assert found.startswith("command line: data.brand_new: is neither a key of ours nor one of verl's that is known here")
    assert not mistakes_of([*right_run(tmp_path), *FITTING, "data.brand_new=False"])


def test_an_option_that_the_algorithm_lacks_is_a_mistake_where_it_would_change_learning(tmp_path: Path) -> None:
    keys = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", *FITTING]
    (found,) = mistakes_of([*right_run(tmp_path), *keys, "trainer.critic_warmup=5"])
    assert "algorithm 'grpo' has no 'critic_warmup_steps' to set to 4" in found
    for harmless in ("trainer.critic_warmup=0", "critic.cliprange_value=0.9", "algorithm.lam=0.9", "critic.ppo_epochs=3"):
        assert not mistakes_of([*right_run(tmp_path), *keys, harmless]), harmless


@pytest.mark.parametrize(
    "override",
    [
        "data.val_batch_size=16",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
        "actor_rollout_ref.ref.log_prob_use_dynamic_bsz=True",
        "trainer.use_legacy_worker_impl=disable",
        "actor_rollout_ref.model.use_fused_kernels=True",
        "actor_rollout_ref.model.use_remove_padding=True",
        "actor_rollout_ref.rollout.layered_summon=True",
        "actor_rollout_ref.model.use_shm=True",
        "actor_rollout_ref.rollout.enable_prefix_caching=True",
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        "data.dataloader_num_workers=3",
        "actor_rollout_ref.actor.fsdp_config.fsdp_size=32",
        "global_profiler.tool=nsys",
        "actor_rollout_ref.actor.profiler.enable=True",
        "transfer_queue.enable=True",
        "actor_rollout_ref.actor.kl_loss_coef=0.5",
        "actor_rollout_ref.actor.use_dynamic_bsz=True",
    ],
)
def test_what_changes_nothing_passes_with_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture, override: str) -> None:
    assert loaded(tmp_path, override) == loaded(tmp_path)
    lines = [message for message in caplog.messages if "change nothing beside the others" in message]
    (line,) = lines
    assert override.partition("=")[0] in line
    caplog.clear()
    loaded(tmp_path, f"{override.partition('=')[0]}=null")
    assert not [message for message in caplog.messages if "change nothing beside" in message]


def test_features_that_are_off_pass(tmp_path: Path) -> None:
    names = [name for name, key in KEYS.items() if key.how in ("only", "-", "same") and key.default is not True]
    leaves = [name for name in names if not any(other.startswith(f"{name}.") for other in KEYS)]
    assert not mistakes_of([*right_run(tmp_path), *FITTING, *(f"{name}=null" for name in leaves)])


def test_rows_of_a_microbatch_become_tokens(tmp_path: Path) -> None:
    lengths = ["data.max_prompt_length=100", "data.max_response_length=28"]
    rows = [
        f"actor_rollout_ref.{part}_micro_batch_size_per_gpu={number}"
        for part, number in (("ref.log_prob", 4), ("actor.ppo", 2))
    ]
    config = loaded(tmp_path, *lengths, *rows)
    assert (config.reference.tokens_per_microbatch, config.actor.tokens_per_microbatch) == (4 * 128, 2 * 128)
    tokens = ["actor_rollout_ref.actor.use_dynamic_bsz=True", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=999"]
    assert loaded(tmp_path, *lengths, *rows, *tokens).actor.tokens_per_microbatch == 999


def test_a_mistake_in_a_translated_key_names_both(tmp_path: Path) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, "data.val_max_samples=0"])
    assert found.startswith("command line (data.val_max_samples): validation.max_prompts: found 0")


def test_the_kl_counts_once(tmp_path: Path) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, "actor.use_kl_loss=True", "algorithm.use_kl_in_reward=True"])
    assert "are both True, but the KL counts once" in found


def test_a_reward_model_scores_alone(tmp_path: Path) -> None:
    keys = ["reward_model.enable=True", "reward_model.model.path=org/scorer"]
    for found in (
        keys,
        [key.replace("reward_model.", "reward.reward_model.", 1).replace("model.path", "model_path") for key in keys],
    ):
        config = loaded(tmp_path, *found)
        assert (config.reward_model.path, config.reward.name) == ("org/scorer", "none")


def test_an_algorithm_of_the_users_own_keeps_options_that_verl_has_too(tmp_path: Path) -> None:
    found = mistakes_of([*right_run(tmp_path), *FITTING, "algorithm=tests.unit.config_cases:Nothing", "algorithm.lam=1"])
    assert found and not any("algorithm.gae_lambda" in line for line in found)
