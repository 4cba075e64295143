"""verl's corrections for what the engine sampled, and losses that go with several advantages, as options of ours."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hybridflow.config.choices import Rejection
from tests.unit.config_cases import mistakes_of, right_run
from tests.unit.test_config_verl import FITTING, loaded, option

BYPASS = "algorithm.rollout_correction.bypass_mode"
CORRECTION = "algorithm.rollout_correction.rollout"


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (f"{CORRECTION}_is=token", {"importance_cap": 2.0, "importance_level": "token", "importance_mask": None}),
        (f"{CORRECTION}_is=sequence {CORRECTION}_is_threshold=5.0", {"importance_cap": 5.0, "importance_level": "sequence"}),
        # IcePop: weights outside are 0, and none is bounded.
        (
            f"{CORRECTION}_is=token {CORRECTION}_is_threshold=0.5_5.0",
            {"importance_cap": None, "importance_mask": (0.5, 5.0), "rejections": ()},
        ),
        (f"{CORRECTION}_is=token {CORRECTION}_is_batch_normalize=True", {"importance_normalized": True}),
        (
            f"{CORRECTION}_rs=seq_mean_k3 {CORRECTION}_rs_threshold=0.01",
            {"importance_cap": "auto", "rejections": (Rejection("sequence_mean_k3", most=0.01),)},
        ),
        # Bounds of k1 are of engine over trainer.
        (
            f"{CORRECTION}_rs=token_k1,seq_max_k2 {CORRECTION}_rs_threshold=0.5_4.0,0.3",
            {
                "rejections": (
                    Rejection("token_k1", most=math.log(4), least=math.log(0.5)),
                    Rejection("sequence_max_k2", most=0.3),
                )
            },
        ),
        # Earlier releases: of trainer over engine, from the bound of the weights, and one token that vetoes.
        (
            f"{CORRECTION}_rs=geometric {CORRECTION}_is_threshold=4 {CORRECTION}_rs_threshold_lower=0.5",
            {"rejections": (Rejection("sequence_mean_k1", most=math.log(2), least=-math.log(4)),)},
        ),
        (f"{CORRECTION}_token_veto_threshold=1e-4", {"rejections": (Rejection("sequence_max_k1", most=-math.log(1e-4)),)}),
        # The ratio over the engine is the weight already; without a ratio the weight counts.
        (
            f"{BYPASS}=True {CORRECTION}_is=token",
            {"old_log_probs": "rollout", "importance_cap": "auto", "surrogate": "clipped_ratio"},
        ),
        (
            f"{BYPASS}=True algorithm.rollout_correction.loss_type=reinforce {CORRECTION}_is=token",
            {"old_log_probs": "rollout", "importance_cap": 2.0, "surrogate": "policy_gradient"},
        ),
    ],
)
@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_a_correction_for_the_engine_is_carried_over(
    tmp_path: Path, estimator: str, overrides: str, options: dict[str, object]
) -> None:
    groups = [] if estimator == "gae" else ["actor_rollout_ref.rollout.n=4"]
    config = loaded(tmp_path, f"algorithm.adv_estimator={estimator}", *groups, *overrides.split())
    assert {name: option(config, name) for name in options} == options


def test_the_loss_of_gpg_goes_with_any_advantages_and_its_own_are_never_divided(tmp_path: Path) -> None:
    loss, groups = "actor.policy_loss.loss_mode=gpg", "actor_rollout_ref.rollout.n=4"
    config = loaded(tmp_path, loss, groups, "algorithm.adv_estimator=rloo", "actor.loss_agg_mode=token-sum")
    assert (config.algorithm.name, option(config, "surrogate")) == ("rloo", "policy_gradient")
    assert option(config, "loss_aggregation") == "token_sum"
    assert option(loaded(tmp_path, loss, groups, "algorithm.adv_estimator=gpg"), "scale_by_std") is False


def test_dro_has_the_weight_that_verl_gives_it(tmp_path: Path) -> None:
    loss = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.n=4", "actor.policy_loss.loss_mode=dro"]
    config = loaded(tmp_path, *loss, "actor.policy_loss.dro_beta=0.25")
    assert (config.algorithm.name, option(config, "beta")) == ("dro", 0.25)
    assert any(
        "Set actor_rollout_ref.actor.policy_loss.dro_beta" in line for line in mistakes_of([*right_run(tmp_path), *loss])
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (f"{CORRECTION}_rs=seq_mean_k1", "Set algorithm.rollout_correction.rollout_rs_threshold"),
        (f"{CORRECTION}_rs=seq_mid_k1 {CORRECTION}_rs_threshold=2", "Set algorithm.rejections"),
        (f"{CORRECTION}_rs=token_k1,token_k2 {CORRECTION}_rs_threshold=1,2,3", "Set one for each, or one for all"),
        (f"{CORRECTION}_is=token {CORRECTION}_is_threshold=-1", "needed: more than 0"),
        (f"{CORRECTION}_rs=token_k2 {CORRECTION}_rs_threshold=0.1_2.0", "has no lower bound. Set it to 2"),
        (f"{CORRECTION}_rs=token_k1 {CORRECTION}_rs_threshold=4.0_2.0", "Exchange them"),
        (
            f"{BYPASS}=True algorithm.rollout_correction.loss_type=reinforce {CORRECTION}_is=token "
            f"{CORRECTION}_is_batch_normalize=True",
            "Set rollout_is_batch_normalize to False",
        ),
        (f"{BYPASS}=True actor.policy_loss.loss_mode=gspo", "to vanilla"),
        (
            "algorithm.adv_estimator=grpo_passk actor.policy_loss.loss_mode=gspo",
            "no algorithm here has the advantages of 'grpo_passk'",
        ),
        ("actor.policy_loss.loss_mode=sapo actor.use_kl_loss=True", "loss_agg_mode=seq-mean-token-mean"),
        ("algorithm.adv_estimator=gdpo algorithm.use_kl_in_reward=True", "use_kl_loss to True"),
    ],
)
def test_what_has_no_equivalent_says_what_to_set(tmp_path: Path, overrides: str, words: str) -> None:
    estimator = [] if "adv_estimator" in overrides else ["algorithm.adv_estimator=grpo"]
    found = mistakes_of([*right_run(tmp_path), *FITTING, *estimator, "actor_rollout_ref.rollout.n=4", *overrides.split()])
    assert any(words in line for line in found), found
