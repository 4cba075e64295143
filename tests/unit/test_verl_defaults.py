"""verl's own files give every key: its defaults pass, and what its scripts switch on goes with any loss of groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.config_cases import mistakes_of, right_run
from tests.unit.test_config_verl import BUFFER, loaded, option

OF_OTHER_ENGINES = """
sandbox_fusion.max_concurrent=null skip.rollout.enable=false skip.rollout.dump_dir=~/.verl/rollout_dump critic.nccl_timeout=600
actor_rollout_ref.actor.qat.group_size=16 actor_rollout_ref.rollout.nnodes=0 actor_rollout_ref.ref.rollout_n=4 data.seed=null
critic.model.lora.rank=0 critic.model.lora.alpha=32 critic.model.mtp.method=mtp critic.data_loader_seed=42
actor_rollout_ref.actor.optim.min_lr=0.0 critic.optim.muon_momentum=0.95 actor_rollout_ref.ref.optim.lr=1e-6
algorithm.filter_groups.max_inflight_gen_batches=1 data.function_tool_path=null trainer.checkpoint_callback_class=null
"""
"""What verl 0.9's own files give beside the keys that its scripts set, for its other engines among them."""


def test_defaults_of_verls_whole_file_pass_wherever_they_are_given(tmp_path: Path) -> None:
    assert loaded(tmp_path, *OF_OTHER_ENGINES.split()) == loaded(tmp_path, "trainer.balance_batch=True")


def test_filtered_groups_and_the_overlong_buffer_go_with_any_loss_of_groups(tmp_path: Path) -> None:
    switches = f"algorithm.filter_groups.enable=True reward_model.reward_manager=dapo {BUFFER}.enable=True {BUFFER}.len=64"
    loss = "algorithm.adv_estimator=grpo actor.policy_loss.loss_mode=gspo actor_rollout_ref.rollout.n=4"
    config = loaded(tmp_path, *f"{switches} {BUFFER}.penalty_factor=0.5 {loss}".split())
    assert config.algorithm.name == "gspo" and option(config, "dynamic_sampling") is True
    assert (option(config, "overlong_buffer_tokens"), option(config, "overlong_penalty")) == (64, 0.5)


def test_without_the_standard_deviation_dppo_centres(tmp_path: Path) -> None:
    loss = "algorithm.adv_estimator=grpo actor.policy_loss.loss_mode=dppo_tv actor_rollout_ref.rollout.n=4"
    assert option(loaded(tmp_path, *loss.split()), "scale_by_std") is True
    config = loaded(tmp_path, *f"{loss} algorithm.norm_adv_by_std_in_grpo=False".split())
    assert config.algorithm.name == "dppo" and option(config, "scale_by_std") is False


@pytest.mark.parametrize("asked", ["adv_estimator=gdpo", "adv_estimator=grpo actor.policy_loss.loss_mode=gspo"])
def test_a_standard_deviation_that_counts_here_whatever_is_said_is_refused(tmp_path: Path, asked: str) -> None:
    overrides = f"placement.pools.main=1x1 data.train_batch_size=256 algorithm.{asked} actor_rollout_ref.rollout.n=4".split()
    assert mistakes_of([*right_run(tmp_path), *overrides]) == []
    (mistake,) = mistakes_of([*right_run(tmp_path), *overrides, "algorithm.norm_adv_by_std_in_grpo=False"])
    assert "norm_adv_by_std_in_grpo: found False, but g" in mistake and "Set it to True, or" in mistake
