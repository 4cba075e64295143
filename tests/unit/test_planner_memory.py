"""What stays on the GPU: invariants of the plan, and its words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hybridflow.config.schema import Config, ModelConfig, ReferenceConfig, RolloutConfig, TrainingConfig
from hybridflow.errors import PlacementError
from hybridflow.planner.decisions import Decisions, resolved
from hybridflow.planner.memory import GIB, Gpu, PoolNeeds, peak, phases
from hybridflow.planner.needs import PoolInfo, is_open, pool_needs
from hybridflow.planner.options import candidates, choose
from hybridflow.planner.refusal import plan_all, refusal
from tests.model_sizes import SEVEN_BILLION

PPO_ROLES = ("actor", "critic", "reference", "rollout")
OF_GIVEN_SIZES = TrainingConfig(tokens_per_microbatch=16384)
DEFAULTS = Config(
    model=ModelConfig(path="7b", compile=False, logits_chunk_tokens=4096),
    actor=OF_GIVEN_SIZES,
    critic=OF_GIVEN_SIZES,
    reference=ReferenceConfig(tokens_per_microbatch=32768),
    rollout=RolloutConfig(engine="vllm", gpu_memory_utilization=0.5),
)
"""Sizes are given here; how they are chosen is in test_planner_search.py."""


def gpu(gib: float) -> Gpu:
    """One that nobody else uses; half a GiB goes to the process."""
    return Gpu(total=int(gib * GIB), free=int((gib - 0.5) * GIB))


def ppo(gib: float, *, ranks: int = 1, config: Config = DEFAULTS, roles: tuple[str, ...] = PPO_ROLES) -> PoolNeeds:
    """PPO of a model of 7B on one pool."""
    sizes = {role: SEVEN_BILLION for role in roles if role in PPO_ROLES}
    pool = PoolInfo(name="main", roles=roles, num_ranks=ranks, gpu=gpu(gib), sizes=sizes)
    return pool_needs(config, pool, set(roles))


def test_ppo_of_7b_with_a_critic_is_refused_on_one_gpu_of_80_gib() -> None:
    with pytest.raises(PlacementError) as refused:
        plan_all([ppo(79.2)])
    message = str(refused.value)
    assert "Pool 'main' has 1 rank(s) with 79.2 GiB" in message
    assert "actor learns" in message and "critic learns" in message
    assert "56.7 GiB  actor: optimizer" in message  # 8 bytes x 7.6e9
    assert "3 of this size suffice (placement.pools.main)" in message
    for advice in ("rollout.gpu_memory_utilization", "tokens_per_microbatch", "model.lora_rank"):
        assert advice in message


@pytest.mark.parametrize(("tensor", "suffice"), [(1, 3), (2, 4), (8, 8)])
def test_the_ranks_that_are_advised_are_the_fewest_for_which_there_is_a_plan(tensor: int, suffice: int) -> None:
    config = replace(DEFAULTS, rollout=replace(DEFAULTS.rollout, tensor_parallel=tensor))
    assert f"{suffice} of this size suffice" in refusal(ppo(79.2, config=config))
    assert choose(ppo(79.2, ranks=suffice, config=config)) is not None
    assert choose(ppo(79.2, ranks=2, config=config)) is None


def test_ranks_are_advised_that_suffice_only_where_gradients_are_shared() -> None:
    large = replace(  # Llama 3 70B
        SEVEN_BILLION,
        parameters=70_553_706_496,
        trained_parameters=70_553_706_496,
        output_parameters=1_050_673_152,
        layer_parameters=855_654_400,
        layers_parameters=80 * 855_654_400,
        num_layers=80,
        hidden=8192,
        attention=8192,
        key_value=1024,
        feed_forward=28672,
        vocabulary=128256,
    )
    pool = PoolInfo(name="main", roles=("actor",), num_ranks=1, gpu=gpu(139.8), sizes={"actor": large})
    needs = pool_needs(DEFAULTS, pool, {"actor"})
    # Weights, gradients and moments take 16 bytes x 7.06e10 = 1,051 GiB, a pass 40 GiB and two layers' gradients 6 GiB on each:
    # 12 ranks need 134 of the 128 GiB, 16 need 112. Whole gradients alone are 263 GiB, on however many ranks.
    assert "16 of this size suffice" in refusal(needs)


def test_ppo_of_7b_with_a_critic_fits_four_gpus_of_80_gib_with_options() -> None:
    plan = choose(ppo(79.2, ranks=4))
    assert plan is not None
    assert {"rollout.sleep", "actor.offload_optimizer", "actor.gradient_checkpointing"} <= plan.options
    assert peak(plan.needs, plan.options).total <= plan.needs.budget


def test_where_everything_fits_nothing_is_done() -> None:
    plan = choose(ppo(1000.0))
    assert plan is not None and plan.options == frozenset()
    assert plan.lines()[0].endswith("nothing is offloaded, slept or recomputed")


def test_more_memory_never_makes_the_plan_dearer() -> None:
    costs = []
    for gib in range(40, 800, 10):
        needs = ppo(gib, ranks=4)
        plan = choose(needs)
        cost = {option: 2**digit for digit, option in enumerate(candidates(needs))}
        costs.append(float("inf") if plan is None else sum(cost[option] for option in plan.options))
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == float("inf") and costs[-1] == 0 and len(set(costs)) > 5


@pytest.mark.parametrize("gib", range(80, 320, 20))
def test_no_option_of_a_plan_could_be_left_out(gib: int) -> None:
    needs = ppo(gib, ranks=4)
    plan = choose(needs)
    assert plan is not None
    for option in plan.options:
        assert peak(needs, plan.options - {option}).total > needs.budget


def test_one_rank_has_nobody_to_share_gradients_with() -> None:
    assert not any("gradients" in option for option in candidates(ppo(80.0)))
    assert candidates(ppo(80.0, ranks=4))[:2] == ["actor.shard_gradients", "critic.shard_gradients"]


def test_no_option_makes_any_phase_larger() -> None:
    needs = ppo(79.2, ranks=4)
    before = [phase.total for phase in phases(needs, set())]
    for option in candidates(needs):
        after = [phase.total for phase in phases(needs, {option})]
        assert all(now <= then for now, then in zip(after, before, strict=True)) and after != before, option


def test_what_the_user_has_decided_stays() -> None:
    own = replace(
        DEFAULTS,
        rollout=replace(DEFAULTS.rollout, sleep=True),
        actor=TrainingConfig(offload_optimizer=False),
        model=replace(DEFAULTS.model, gradient_checkpointing=True),
    )
    for gib in (150.0, 1000.0):
        plan = choose(ppo(gib, ranks=4, config=own))
        assert plan is not None
        assert {"rollout.sleep", "actor.gradient_checkpointing", "critic.gradient_checkpointing"} <= plan.options
        assert "actor.offload_optimizer" not in plan.options
        assert "rollout.sleep (as configured)" in plan.lines()[0]


def test_a_switch_that_is_off_is_named_where_it_stands_in_the_way() -> None:
    off = replace(DEFAULTS, rollout=replace(DEFAULTS.rollout, sleep=False))
    assert choose(ppo(79.2, ranks=4)) is not None
    with pytest.raises(PlacementError, match=r"leave to the plan \(auto\) what is switched off: rollout\.sleep"):
        plan_all([ppo(79.2, ranks=4, config=off)])


def test_every_pool_that_does_not_fit_is_listed() -> None:
    learner = ppo(40.0, roles=("actor", "reference"))
    engine = replace(ppo(40.0, roles=("rollout",)), pool="gen", gpu=Gpu(total=40 * GIB, free=10 * GIB))
    with pytest.raises(PlacementError) as refused:
        plan_all([learner, ppo(79.2, ranks=4), engine])
    assert "Pool 'main' has 1 rank(s) with 40.0" in str(refused.value) and "Pool 'gen'" in str(refused.value)
    assert "Other processes hold 30.0 GiB" in str(refused.value)


def test_an_engine_alone_has_no_options() -> None:
    plan = choose(ppo(79.2, roles=("rollout",)))
    assert plan is not None and not candidates(plan.needs) and peak(plan.needs, set()).name == "generation"


def test_a_role_of_the_users_own_gets_a_reserve() -> None:
    with_own, without = (ppo(100.0, roles=roles) for roles in (("rollout", "judge", "reward", "data"), ("rollout",)))
    assert peak(with_own, set()).total - peak(without, set()).total == 5 * GIB  # 5 % of 100
    assert "judge: reserved, since its needs are not known" in peak(with_own, set()).usage


def test_an_engine_that_keeps_its_weights_frees_less() -> None:
    other = replace(DEFAULTS, rollout=replace(DEFAULTS.rollout, engine="sglang"))
    kept = []
    for config in (DEFAULTS, other):
        (learns,) = [phase for phase in phases(ppo(500.0, config=config), {"rollout.sleep"}) if phase.name == "actor learns"]
        kept.append(learns.usage["rollout: asleep"])
    assert kept[1] - kept[0] == SEVEN_BILLION.parameters * 2  # bfloat16


def test_an_option_is_given_with_its_reason() -> None:
    plan = choose(ppo(150.0, ranks=4))
    assert plan is not None
    (line,) = [line for line in plan.lines() if "recomputes" in line and "of actor" in line]
    assert line.startswith("  model.gradient_checkpointing of actor: recomputes")
    assert "without it 'actor learns' takes" in line


def test_resolved_switches_are_true_or_false_for_each_role() -> None:
    made = Decisions(options=frozenset({"rollout.sleep", "critic.gradient_checkpointing", "critic.offload_optimizer"}))
    actor, critic = (resolved(DEFAULTS, made, role) for role in ("actor", "critic"))
    assert (actor.model.gradient_checkpointing, critic.model.gradient_checkpointing) == (False, True)
    for config in (actor, critic):
        assert (config.rollout.sleep, config.reference.offload_parameters) == (True, False)
        assert (config.critic.offload_optimizer, config.critic.offload_parameters) == (True, False)
        assert (config.actor.offload_optimizer, config.actor.offload_parameters) == (False, False)


def test_resolving_leaves_what_was_decided() -> None:
    own = replace(DEFAULTS, actor=TrainingConfig(offload_parameters=True, offload_optimizer=False))
    config = resolved(own, Decisions(options=frozenset({"actor.offload_optimizer"})), "actor")
    assert (config.actor.offload_parameters, config.actor.offload_optimizer) == (True, False)


def test_only_roles_with_something_on_auto_are_planned() -> None:
    assert is_open(DEFAULTS, {"rollout"}) and not is_open(DEFAULTS, {"data", "reward"})
    awake = replace(DEFAULTS, rollout=replace(DEFAULTS.rollout, sleep=False))
    assert not is_open(awake, {"rollout"})
    assert is_open(replace(awake, rollout=replace(awake.rollout, gpu_memory_utilization="auto")), {"rollout"})
    kept = replace(DEFAULTS.reference, offload_parameters=False)
    assert not is_open(replace(DEFAULTS, reference=kept), {"reference"})
    assert is_open(replace(DEFAULTS, reference=replace(kept, tokens_per_microbatch="auto")), {"reference"})


def test_a_row_longer_than_a_microbatch_counts_whole() -> None:
    long_rows = replace(DEFAULTS, data=replace(DEFAULTS.data, max_response_tokens=100_000))
    (actor, *_) = ppo(79.2, config=long_rows).models
    assert actor.tokens == 100_512


def test_merging_adapters_is_a_peak_of_its_own() -> None:
    adapted = replace(SEVEN_BILLION, trained_parameters=10_000_000)
    pool = PoolInfo(
        name="main", roles=("actor", "rollout"), num_ranks=1, gpu=gpu(140.0), sizes={"actor": adapted, "rollout": SEVEN_BILLION}
    )
    needs = pool_needs(DEFAULTS, pool, {"actor", "rollout"})
    (sync,) = [phase for phase in phases(needs, set()) if phase.name == "weight sync"]
    assert sync.usage["actor: merged weights"] == 4 * SEVEN_BILLION.parameters
