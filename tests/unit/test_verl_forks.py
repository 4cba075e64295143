"""Keys of projects that build on verl, and of earlier releases: they count, change nothing, or say what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

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
