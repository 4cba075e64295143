"""How large microbatches, chunks of logits and the engine's share are, on cards of the sizes that people have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hybridflow.algorithms import grpo, ppo
from hybridflow.checkpoint.plan_note import PlanNote, read_note
from hybridflow.config.schema import (
    AlgorithmConfig,
    Config,
    DataConfig,
    ModelConfig,
    PlacementConfig,
    ReferenceConfig,
    RolloutConfig,
    RunConfig,
    TrainingConfig,
)
from hybridflow.errors import PlacementError
from hybridflow.planner.decisions import Decisions, resolved
from hybridflow.planner.memory import GIB, Gpu, PoolNeeds, learning, peak, phases
from hybridflow.planner.needs import PoolInfo, compiling_pays, pool_needs
from hybridflow.planner.options import PoolPlan
from hybridflow.planner.refusal import plan_all
from hybridflow.planner.search import fingerprint, plan, planned_before
from hybridflow.planner.sizes import ModelSize
from tests.model_sizes import HALF_BILLION, SEVEN_BILLION, SMOL

MODELS = ("actor", "critic", "reference")
PPO = Config(  # that of configs/gsm8k_ppo.yaml
    model=ModelConfig(path="model"),
    algorithm=AlgorithmConfig(name="ppo", options=ppo.Config(prompts_per_update=32)),
    data=DataConfig(prompts_per_step=64, max_prompt_tokens=512, max_response_tokens=512),
    rollout=RolloutConfig(engine="vllm"),
    run=RunConfig(total_steps=100),
)
GRPO = replace(
    PPO,
    algorithm=AlgorithmConfig(name="grpo", options=grpo.Config(responses_per_prompt=8, kl_in="loss")),
    data=replace(PPO.data, prompts_per_step=128, max_prompt_tokens=256, max_response_tokens=1024),
    rollout=RolloutConfig(engine="vllm", tensor_parallel=2),
)


def info(size: ModelSize, gib: float, *, ranks: int = 1, roles: tuple[str, ...] = (*MODELS, "rollout")) -> PoolInfo:
    """A pool of cards of which half a GiB is taken by the processes."""
    gpu = Gpu(total=int(gib * GIB), free=int((gib - 0.5) * GIB))
    return PoolInfo(name="main", roles=roles, num_ranks=ranks, gpu=gpu, sizes=dict.fromkeys(roles, size))


def needs(config: Config, pool: PoolInfo) -> PoolNeeds:
    return pool_needs(config, pool, {*pool.roles, "actor", "rollout"}, is_compiled=config is GRPO)


def planned(config: Config, pool: PoolInfo) -> PoolPlan:
    found = plan(needs(config, pool))
    assert found is not None and peak(found.needs, found.options).total <= found.needs.budget
    return found


def test_half_a_billion_by_ppo_fits_a_card_of_24_gb() -> None:
    made = planned(PPO, info(HALF_BILLION, 23.5)).decisions
    assert made.update_tokens["actor"] >= 8192 and made.update_tokens["critic"] >= 8192
    assert "actor.offload_parameters" not in made.options and "rollout.sleep" not in made.options
    # 0.92 GiB of weights, and rows of 1,024 tokens at 24 layers x 2 x 128 channels x 2 bytes each
    assert made.engine_share["rollout"] * 23.5 * GIB > 2 * HALF_BILLION.parameters + 32 * 1024 * 12288


def test_half_a_billion_by_ppo_fits_a_card_of_16_gb_with_what_the_plan_switches_on() -> None:
    made = planned(PPO, info(HALF_BILLION, 15.6)).decisions
    assert {"actor.gradient_checkpointing", "critic.offload_optimizer", "rollout.sleep"} <= made.options
    assert made.update_tokens["actor"] >= 4096 and made.chunk_tokens["actor"] < 4096


@pytest.mark.parametrize("gib", [79.2, 139.8])
def test_half_a_billion_needs_no_options_on_a_large_card_and_gets_large_microbatches(gib: float) -> None:
    found = planned(PPO, info(HALF_BILLION, gib))
    assert found.options == frozenset()
    assert found.decisions.update_tokens["actor"] >= 20480 and found.decisions.forward_tokens["reference"] == 65536


def test_where_a_card_is_large_sizes_end_where_more_gains_nothing() -> None:
    made = planned(PPO, info(HALF_BILLION, 139.8)).decisions
    # 4e11 / 14.9e6 = 26,823 tokens, in multiples of 2,048; a step has 64 rows of 1,024 tokens at most.
    assert made.update_tokens == {"actor": 26624, "critic": 26624}
    assert made.forward_tokens == dict.fromkeys(MODELS, 65536)
    assert made.engine_share["rollout"] == pytest.approx(0.3, abs=0.011)


def test_a_small_model_gets_more_tokens_at_once_than_a_large_one() -> None:
    long_steps = replace(PPO, data=replace(PPO.data, prompts_per_step=512))
    small, large = (planned(long_steps, info(size, 139.8)).decisions.update_tokens["actor"] for size in (SMOL, HALF_BILLION))
    assert small == 65536 > large


@pytest.mark.parametrize("gib", [79.2, 139.8])
def test_seven_billion_by_grpo_fits_four_cards(gib: float) -> None:
    found = planned(GRPO, info(SEVEN_BILLION, gib, ranks=4, roles=("actor", "reference", "rollout")))
    assert found.decisions.update_tokens["actor"] >= 4096 and found.decisions.forward_tokens["reference"] == 32768
    assert "actor.offload_parameters" not in found.options and "rollout.sleep" not in found.options
    assert bool(found.options) == (gib < 100)


def test_seven_billion_by_ppo_fits_four_cards_of_80_gb() -> None:
    found = planned(replace(PPO, rollout=GRPO.rollout), info(SEVEN_BILLION, 79.2, ranks=4))
    assert {"actor.gradient_checkpointing", "critic.gradient_checkpointing"} <= found.options


@pytest.mark.parametrize("size", [SMOL, HALF_BILLION])
def test_more_free_memory_never_makes_microbatches_smaller(size: ModelSize) -> None:
    model = replace(PPO.model, logits_chunk_tokens=1024, gradient_checkpointing=False)
    rollout = replace(PPO.rollout, gpu_memory_utilization=0.05, sleep=False)
    bare, given = replace(PPO, model=model, rollout=rollout), list[int]()
    for gib in range(40, 140, 4):
        pool = info(size, 139.8)
        found = plan(needs(bare, replace(pool, gpu=replace(pool.gpu, free=gib * GIB))))
        given.append(0 if found is None else found.decisions.update_tokens["actor"])
    assert given == sorted(given) and len(set(given)) > 4


def test_given_numbers_win() -> None:
    given = replace(
        PPO,
        model=replace(PPO.model, logits_chunk_tokens=512),
        actor=TrainingConfig(tokens_per_microbatch=3000),
        critic=TrainingConfig(tokens_per_microbatch=5000, forward_tokens_per_microbatch=7000),
        reference=ReferenceConfig(tokens_per_microbatch=9000),
        rollout=replace(PPO.rollout, gpu_memory_utilization=0.4),
    )
    found = planned(given, info(HALF_BILLION, 139.8))
    assert found.decisions == Decisions()
    config = resolved(given, found.decisions, "actor")
    assert (config.actor.update_tokens, config.actor.forward_tokens) == (3000, 3000)
    assert (config.critic.update_tokens, config.critic.forward_tokens) == (5000, 7000)
    assert (config.reference.forward_tokens, config.model.logits_chunk_tokens) == (9000, 512)
    assert config.rollout.gpu_memory_utilization == 0.4
    assert "microbatches of 3,000 tokens (as configured), without gradients 3,000 tokens (as configured)" in found.lines()[1]


def test_a_given_number_without_gradients_is_kept_beside_a_chosen_one() -> None:
    config = replace(PPO, actor=TrainingConfig(forward_tokens_per_microbatch=4321))
    actor = resolved(config, planned(config, info(HALF_BILLION, 139.8)).decisions, "actor").actor
    assert (actor.update_tokens, actor.forward_tokens) == (26624, 4321)


def test_the_log_says_how_many_tokens_and_why() -> None:
    large, small = (planned(PPO, info(HALF_BILLION, gib)).lines() for gib in (139.8, 23.5))
    assert "microbatches of 26,624 tokens (more gains nothing), without gradients 65,536 tokens" in large[1]
    assert "tokens (what memory allows)" in small[1]
    assert "(0.30 of the GPU)" in next(line for line in large if line.startswith("  rollout"))


def test_without_a_plan_sizes_are_the_modest_ones_of_always() -> None:
    config = resolved(Config())
    assert (config.actor.update_tokens, config.actor.forward_tokens, config.reference.forward_tokens) == (16384, 16384, 32768)
    assert (config.model.logits_chunk_tokens, config.model.compile) == (4096, False)
    assert config.rollout.gpu_memory_utilization == 0.5


def test_an_engine_with_a_card_to_itself_takes_nearly_all_of_it() -> None:
    made = planned(PPO, info(HALF_BILLION, 79.2, roles=("rollout",))).decisions
    assert made.engine_share["rollout"] == pytest.approx(0.85, abs=0.01)


SPLIT = replace(PPO, placement=PlacementConfig(pools={"train": "1x2", "gen": "1x2"}, roles={"rollout": "gen"}))


def own_pool(size: ModelSize, gib: float, taken: float, *own_roles: str) -> PoolNeeds:
    """Of an engine that receives weights from another pool, on cards of which `taken` GiB are held by others."""
    gpu = Gpu(total=int(gib * GIB), free=int((gib - taken) * GIB))
    pool = PoolInfo(name="gen", roles=("rollout", *own_roles), num_ranks=2, gpu=gpu, sizes={"rollout": size})
    return pool_needs(SPLIT, pool, {"actor", *pool.roles})


@pytest.mark.parametrize(
    ("size", "gib", "taken", "own_roles"),
    [
        (HALF_BILLION, 23.5, 0.5, ()),
        (HALF_BILLION, 79.2, 6, ()),
        (HALF_BILLION, 79.2, 0.5, ("judge", "critic_of_mine")),
        (SEVEN_BILLION, 44.5, 0.5, ()),
        (SEVEN_BILLION, 47.5, 0.5, ()),
        (SEVEN_BILLION, 79.2, 4, ()),
        (SEVEN_BILLION, 79.2, 6, ("judge",)),
    ],
)
def test_an_engine_with_a_card_to_itself_leaves_room_for_buffers_and_the_users_roles(
    size: ModelSize, gib: float, taken: float, own_roles: tuple[str, ...]
) -> None:
    asked = own_pool(size, gib, taken, *own_roles)
    assert asked.sync_buffers > 0.9 * GIB
    found = plan(asked)
    assert found is not None and found.needs.engine is not None
    # All that can be planned with is used: less than 85 % of the card, and more than all rows of a step need.
    assert found.needs.engine.wanted[0] < found.needs.engine.num_bytes < 0.85 * gib * GIB
    assert 0 <= asked.budget - peak(found.needs, found.options).total < 100


def test_an_engine_that_has_no_room_for_its_weights_is_refused() -> None:
    with pytest.raises(PlacementError, match="rollout: weights and cache"):
        plan_all([own_pool(SEVEN_BILLION, 15.6, 0.5)])


def test_what_reads_text_takes_nothing_of_a_card() -> None:
    assert own_pool(HALF_BILLION, 79.2, 0.5, "data", "reward", "pretraining", "judge").unknown_roles == ("judge",)


def test_an_engine_beside_large_models_has_room_for_rows_before_they_get_larger_microbatches() -> None:
    found = planned(GRPO, info(SEVEN_BILLION, 139.8, ranks=4, roles=("actor", "reference", "rollout")))
    # 512 rows for each of two engines of two ranks, each of 1,280 tokens x 28 layers x 2 x 512 channels x 2 bytes
    assert found.decisions.engine_share["rollout"] * 139.8 * GIB > (512 * 1280 * 28 * 2 * 512 * 2 + 2 * 7.6e9) / 2


@pytest.mark.parametrize(("steps", "pays"), [(10, False), (5000, True)])
def test_compiling_pays_in_a_long_run(steps: int, pays: bool) -> None:
    pool = info(HALF_BILLION, 139.8)
    assert compiling_pays(replace(PPO, run=RunConfig(total_steps=steps)), [pool], None) is pays


def test_the_length_of_a_run_over_epochs_is_known_from_its_rows() -> None:
    # A step has 64 rows of 512 tokens on average: 6 x 2 x 494e6 x 32,768 = 1.94e14 operations, of which 0.194 s are saved. So
    # 120 s take 618 steps, or 39,600 rows.
    epoch, pool = replace(PPO, run=RunConfig(total_epochs=1)), info(HALF_BILLION, 139.8)
    assert compiling_pays(epoch, [pool], 30_000) is False and compiling_pays(epoch, [pool], 50_000) is True
    assert compiling_pays(replace(epoch, run=RunConfig(total_epochs=2)), [pool], 30_000) is True
    assert compiling_pays(epoch, [pool], None) is True


def test_a_compiled_model_keeps_less_and_gets_no_smaller_microbatches() -> None:
    pool = info(HALF_BILLION, 60.0)
    eager, compiled = (plan(pool_needs(PPO, pool, set(pool.roles), is_compiled=value)) for value in (False, True))
    assert eager is not None and compiled is not None
    assert compiled.decisions.update_tokens["actor"] > eager.decisions.update_tokens["actor"]


def test_a_run_that_goes_on_takes_the_plan_that_it_has_made_though_less_is_free(tmp_path: Path) -> None:
    asked = needs(PPO, info(HALF_BILLION, 79.2))
    (first,) = plan_all([asked])
    PlanNote(is_compiled=True, pools={fingerprint(asked): first.decisions}).write(tmp_path)
    less = replace(asked, gpu=replace(asked.gpu, free=asked.gpu.free - 6 * GIB))
    assert plan(less) != first  # or the note would not be needed
    (again,) = plan_all([less], read_note(tmp_path).pools)
    assert again.decisions == first.decisions and read_note(tmp_path).is_compiled is True


def test_a_plan_of_before_that_does_not_fit_any_more_is_made_anew(tmp_path: Path) -> None:
    asked = needs(PPO, info(HALF_BILLION, 79.2))
    (first,) = plan_all([asked])
    less = replace(asked, gpu=replace(asked.gpu, free=30 * GIB))
    (again,) = plan_all([less], {fingerprint(asked): first.decisions})
    assert again.decisions == plan_all([less])[0].decisions != first.decisions


def test_a_plan_for_other_needs_is_not_taken() -> None:
    pool = info(HALF_BILLION, 79.2)
    assert fingerprint(needs(PPO, pool)) != fingerprint(needs(replace(PPO, actor=TrainingConfig(offload_optimizer=True)), pool))


@pytest.mark.parametrize(
    "other",
    [
        replace(PPO, rollout=replace(PPO.rollout, gpu_memory_utilization=0.5)),
        replace(PPO, rollout=replace(PPO.rollout, max_num_seqs=16)),
        replace(PPO, loop=replace(PPO.loop, max_staleness=3)),
    ],
)
def test_a_plan_for_an_engine_that_generates_otherwise_is_not_taken(other: Config) -> None:
    pool = info(HALF_BILLION, 79.2)
    (before,) = plan_all([needs(other, pool)])
    assert fingerprint(needs(other, pool)) != fingerprint(needs(PPO, pool))
    noted = {fingerprint(needs(other, pool)): before.decisions}
    assert plan_all([needs(PPO, pool)], noted) == plan_all([needs(PPO, pool)])


def test_free_memory_does_not_tell_plans_of_an_engine_with_a_card_to_itself_apart() -> None:
    assert fingerprint(own_pool(SEVEN_BILLION, 79.2, 0.5)) == fingerprint(own_pool(SEVEN_BILLION, 79.2, 6))


def test_a_note_without_a_share_for_the_engine_gives_it_none_of_zero() -> None:
    asked = needs(PPO, info(HALF_BILLION, 79.2))
    (first,) = plan_all([asked])
    noted = replace(first.decisions, engine_share={})
    assert planned_before(asked, first.decisions) is not None and planned_before(asked, noted) is None


def test_a_note_that_is_damaged_counts_nothing(tmp_path: Path) -> None:
    assert read_note(tmp_path) == PlanNote()
    for content in ("", "[]", '{"pools": {"a": {"unknown": 1}}, "is_compiled": true}'):
        (tmp_path / "plan.json").write_text(content)
        assert read_note(tmp_path) == PlanNote()


def test_an_update_has_memory_for_the_tokens_that_were_chosen() -> None:
    found = planned(PPO, info(HALF_BILLION, 79.2))
    (learns,) = [phase for phase in phases(found.needs, found.options) if phase.name == learning("actor")]
    assert learns.total <= 0.9 * found.needs.budget
