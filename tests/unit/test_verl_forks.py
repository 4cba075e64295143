"""Keys of projects that build on verl, and of earlier releases: they count, change nothing, or say what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hybridflow.config.command_line import parse
from tests.unit.config_cases import mistakes_of, right_run
from tests.unit.test_config_verl import FITTING, loaded, option

GROUPS = ("algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=8")
HARMLESS = """
data.val_batch_size=500 data.shuffle_train_dataloader=True data.oversample_factor=4.0 data.filter_accuracy=False
data.accuracy_lower_bound=0.2 data.accuracy_upper_bound=0.8
actor_rollout_ref.rollout.micro_rollout_batch_size=1024 actor_rollout_ref.rollout.n_agent=1
actor_rollout_ref.actor.state_masking=true
+actor_rollout_ref.model.override_config.attn_implementation=sdpa actor_rollout_ref.model.attn_implementation=flash_attention_2
+actor_rollout_ref.ref.override_config.attn_implementation=sdpa actor_rollout_ref.actor.adaptive_entropy.enabled=False
actor_rollout_ref.actor.adaptive_entropy.target_entropy=0.2 trainer.remove_clip=False trainer.rejection_sample=False
trainer.stats_path=stats trainer.v1.trainer_mode=sync +debug=False recurrent.enable=null
+actor_rollout_ref.model.override_config.attention_dropout=0. +actor_rollout_ref.model.override_config.embd_pdrop=0.
actor_rollout_ref.model.lora_rank=0 actor_rollout_ref.model.lora_alpha=0 actor_rollout_ref.actor.optim.clip_grad=1.0
actor_rollout_ref.actor.load_weight=True actor_rollout_ref.actor.router_replay.record_file=null critic.load_weight=True
actor_rollout_ref.rollout.skip.dump_dir=/x actor_rollout_ref.rollout.skip.action=cache hydra/job_logging=disabled
hydra.run.dir=. actor_rollout_ref.rollout.use_fire_sampling=False
+trainer.num_global_batch=1 +trainer.log_freq=1 reward_model.nccl_timeout=600
actor_rollout_ref.rollout.server.timeout=60 trainer.checkpoint.save_contents=[model] trainer.max_ckpt_to_keep=null
algorithm.rollout_correction.use_policy_gradient=False actor_rollout_ref.actor.use_rollout_log_probs=False
"""


def test_what_changes_nothing_passes(tmp_path: Path) -> None:
    assert loaded(tmp_path, *GROUPS, *HARMLESS.split()) == loaded(tmp_path, *GROUPS)


def test_validation_is_as_forks_ask_for_it(tmp_path: Path) -> None:
    rollout = "actor_rollout_ref.rollout"
    config = loaded(tmp_path, *GROUPS, f"{rollout}.val_temperature=0.6", f"{rollout}.n_val=8")
    assert (config.validation.temperature, config.validation.responses_per_prompt) == (0.6, 8)


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce_plus_plus_baseline"])
def test_one_response_to_each_prompt_is_as_in_verl_a_reward_without_a_baseline_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, estimator: str
) -> None:
    config = loaded(tmp_path, f"algorithm.adv_estimator={estimator}", "actor_rollout_ref.rollout.n=1")
    assert (config.algorithm.name, option(config, "responses_per_prompt")) == (estimator, 1)
    (line,) = [line for line in caplog.messages if "without a baseline" in line]
    assert "(actor_rollout_ref.rollout.n)" in line


def test_one_response_to_each_prompt_goes_with_the_overlong_buffer_and_not_with_filtered_groups(tmp_path: Path) -> None:
    buffer = "reward_model.reward_kwargs.overlong_buffer_cfg"
    overlong = ["reward_model.reward_manager=dapo", f"{buffer}.enable=True", f"{buffer}.len=64", f"{buffer}.penalty_factor=1"]
    one = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=1"]
    config = loaded(tmp_path, *one, *overlong)
    assert (config.algorithm.name, option(config, "responses_per_prompt")) == ("dapo", 1)
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, *one, *overlong, "algorithm.filter_groups.enable=True"])
    assert "a group of one is one" in found


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.actor.adaptive_entropy.enabled=True", "set algorithm.entropy_coefficient"),
        ("trainer.rejection_sample=True", "set algorithm.filter_groups.enable"),
        ("trainer.remove_clip=True", "set algorithm.surrogate=policy_gradient"),
        ("trainer.v1.trainer_mode=separate_async", "set loop.max_staleness"),
        ("data.filter_accuracy=True", "set algorithm=dapo"),
        ("actor_rollout_ref.actor.state_masking=False", "set it to True"),
        ("trainer.device=npu", "set it to cuda or cpu"),
        ("actor_rollout_ref.model.override_config.attention_dropout=0.1", "set it to 0"),
        ("actor_rollout_ref.actor.resource_pool_id=trainer_pool", "set placement.roles"),
        ("resource_pool_specs=[{id:trainer_pool,nnodes:1}]", "set placement.pools"),
        ("actor_rollout_ref.actor.use_rollout_log_probs=True", "set algorithm.old_log_probs=rollout"),
        ("actor_rollout_ref.rollout.use_fire_sampling=True", "set it to False"),
        ("reward_model.model.update=before", "of PRIME"),
        ("actor_rollout_ref.actor.sppo_eta=1e3", "write it as an algorithm"),
        ("data.messages_key=messages", "set algorithm=sft"),
        ("data.output_path=/x", "hybridflow.evaluate"),
        ("reward.max_rpm=100", "set reward.concurrency"),
        ("retriever.url=http://x", "take it out, or write that"),
        ("data.max_obs_length=500", "take it out, or write that"),
        ("actor_rollout_ref.actor.proj_layer=3", "take it out, or write that"),
        ("algorithm.filter_sample.enable=True", "take it out, or write that"),
        ("+debug=True", "take it out, or write that"),
        ("modle.compile=false", "did you mean 'model.compile'?"),
        ("rollot.enforce_eager=false", "did you mean 'rollout.enforce_eager'?"),
        ("trakers.names=null", "did you mean 'trackers.names'?"),
    ],
)
def test_what_would_change_learning_says_what_to_do(tmp_path: Path, override: str, words: str) -> None:
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, *GROUPS, override])
    assert words in found and "no such key" not in found


@pytest.mark.parametrize(
    "setting",
    [
        "trainer.val_before_trian=False",
        "actor_rollout_ref.actor.use_kl_los=False",
        "actor_rollout_ref.rollout.free_cache_engin=False",
    ],
)
def test_a_misspelt_key_of_verls_that_is_off_is_told(tmp_path: Path, setting: str) -> None:
    """What was meant would stay on, in silence."""
    key = setting.partition("=")[0]
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, *GROUPS, setting])
    assert f"{key}: verl's key is not known here. Did you mean" in found


@pytest.mark.parametrize(
    ("settings", "key", "value"),
    [
        (["actor_rollout_ref.actor.optim.clip_grad=0.5"], "actor.max_grad_norm", 0.5),
        (["actor_rollout_ref.actor.grad_clip=0.2", "actor_rollout_ref.actor.optim.grad_clip=0.2"], "actor.max_grad_norm", 0.2),
        (["critic.optim.clip_grad=2"], "critic.max_grad_norm", 2.0),
        (["trainer.max_ckpt_to_keep=2"], "checkpoint.keep", 2),
        (["reward_model.max_concurrent=4"], "reward.concurrency", 4),
        (["reward_model.timeout=30"], "reward.timeout_s", 30.0),
        (
            ["+data.apply_chat_template_kwargs={enable_thinking:False}"],
            "data.chat_template_options",
            {"enable_thinking": False},
        ),
        (["trainer.experiment_name='a,b'"], "trackers.run_name", "a,b"),
        (['trainer.project_name="my project"'], "trackers.project", "my project"),
        (["trainer.logger=[ 'console' , \"tensorboard\" ]"], "trackers.names", ("console", "tensorboard")),
    ],
)
def test_every_name_of_a_key_and_every_way_to_write_a_value_counts(
    tmp_path: Path, settings: list[str], key: str, value: object
) -> None:
    config = loaded(tmp_path, *GROUPS, *settings, bare=("trackers.names",))
    section, name = key.split(".")
    assert vars(vars(config)[section])[name] == value


def test_two_norms_of_gradients_are_refused_in_any_order(tmp_path: Path) -> None:
    both = ["actor_rollout_ref.actor.grad_clip=0.2", "actor_rollout_ref.actor.optim.clip_grad=1.0"]
    for settings in (both, both[::-1]):
        (found,) = mistakes_of([*right_run(tmp_path), *FITTING, *GROUPS, *settings])
        assert "which say 0.2 and 1.0. Set actor.max_grad_norm" in found


def test_one_norm_of_gradients_may_be_written_in_two_ways(tmp_path: Path) -> None:
    both = ["actor_rollout_ref.actor.grad_clip='1.0'", "actor_rollout_ref.actor.optim.clip_grad=1.0"]
    assert loaded(tmp_path, *GROUPS, *both).actor.max_grad_norm == 1.0


def test_a_scale_of_adapters_that_is_0_is_refused_where_it_was_given(tmp_path: Path) -> None:
    given = ["actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=0"]
    (found,) = mistakes_of([*right_run(tmp_path), *FITTING, *GROUPS, *given])
    assert found.startswith("command line (actor_rollout_ref.model.lora_alpha): model.lora_alpha: found 0")


def test_the_first_names_of_the_covariance_losses_choose_them(tmp_path: Path) -> None:
    actor = "actor_rollout_ref.actor"
    config = loaded(tmp_path, *GROUPS, f"{actor}.loss_mode=kl_cov", f"{actor}.kl_cov_ratio=0.02", f"{actor}.ppo_kl_coef=1")
    assert (config.algorithm.name, option(config, "share"), option(config, "covariance_kl")) == ("kl_cov", 0.02, 1.0)


def test_a_policy_gradient_by_the_name_of_verl_0_6_is_one(tmp_path: Path) -> None:
    correction = "algorithm.rollout_correction"
    config = loaded(tmp_path, *GROUPS, f"{correction}.bypass_mode=True", f"{correction}.use_policy_gradient=True")
    assert (option(config, "surrogate"), option(config, "old_log_probs")) == ("policy_gradient", "rollout")


def test_pf_ppo_draws_rows_with_gae_alone(tmp_path: Path) -> None:
    on = ["algorithm.use_pf_ppo=True", "algorithm.pf_ppo.reweight_method=max_min", "algorithm.pf_ppo.weight_pow=3"]
    config = loaded(tmp_path, "algorithm.adv_estimator=gae", *on)
    assert option(config, "resampling") == "best_and_worst"
    assert option(loaded(tmp_path, "algorithm.adv_estimator=gae", on[0], on[2]), "resampling") == 3.0
    assert option(loaded(tmp_path, "algorithm.adv_estimator=gae", on[1]), "resampling") is None
    assert loaded(tmp_path, *GROUPS, *on) == loaded(tmp_path, *GROUPS), "as in verl"


def test_hydras_time_is_that_of_the_command(tmp_path: Path) -> None:
    config = loaded(tmp_path, *GROUPS, "trainer.experiment_name='x_${now:%Y}'")
    assert re.fullmatch(r"x_20\d\d", config.trackers.run_name or "")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ppo_trainer.yaml", []),
        ("ppo_megatron_trainer", ["model_engine"]),
        ("fully_async_ppo_megatron_trainer.yaml", ["trainer.v1.trainer_mode", "model_engine"]),
    ],
)
def test_verls_own_files_by_name_say_what_they_change(tmp_path: Path, name: str, words: list[str]) -> None:
    options = parse([f"--config-name={name}", "--config-path=config", *right_run(tmp_path), *FITTING, *GROUPS])
    assert options.config is None
    found = mistakes_of(options.overrides)
    assert len(found) == len(words) and all(f"{word}: " in line for word, line in zip(words, found, strict=True))
