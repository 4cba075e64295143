"""Actor, critic and reference in one process: updates, schedules, offloading, state."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hybridflow.batch import Batch
from hybridflow.config.schema import Config, LoopConfig, TrainingConfig
from hybridflow.errors import BatchError, CheckpointError
from hybridflow.metrics import Metrics
from hybridflow.ops.losses import NextTokenLoss, PolicyLoss, ValueLoss
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.reference import ReferenceWorker
from hybridflow.workers.training import learning_rate
from tests.training_rows import (
    context_of,
    model_without_zero_weights,
    random_batch,
    relative_difference,
    training_config,
    whole_weights,
)

LENGTHS = [(3, 5), (1, 80), (40, 1), (9, 9), (2, 7), (30, 30), (1, 1)]
LOSS = PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.01)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


def actor_of(config: Config) -> ActorWorker:
    return ActorWorker(config, context_of("actor"))


def train(config: Config, *, updates: int = 3, loss: PolicyLoss = LOSS) -> tuple[ActorWorker, list[Metrics]]:
    actor = actor_of(config)
    metrics = []
    for step in range(1, updates + 1):
        actor.begin_step(step, updates)
        metrics.append(actor.update(random_batch(LENGTHS, seed=step), loss=loss))
    return actor, metrics


def test_utilisation_counts_the_tokens_and_weights_of_an_update(model_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridflow.workers.training.peak_flops", lambda device: 1e9)
    ticks = iter([10.0, 12.0])
    actor = actor_of(training_config(model_path))
    monkeypatch.setattr("hybridflow.workers.training.time.perf_counter", lambda: next(ticks))
    metrics = actor.update(random_batch([(3, 5), (1, 1)], seed=0), loss=LOSS)
    # Two layers of 64 x (64 + 32 + 32 + 64) and 3 x 64 x 128 for 10 tokens; the output layer for 6 tokens of responses.
    products = 73_728 * 10 + 64 * actor.model.causal_lm.config.vocab_size * 6
    assert metrics["actor/mfu"] == pytest.approx(6 * products / (2.0 * 1e9))


def assert_same_training(found: tuple[ActorWorker, list[Metrics]], expected: tuple[ActorWorker, list[Metrics]]) -> None:
    for one, other in zip(found[1], expected[1], strict=True):
        assert one["actor/loss"] == pytest.approx(other["actor/loss"], rel=1e-5)
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=1e-5)
    weights, expected_weights = whole_weights(found[0].named_tensors()), whole_weights(expected[0].named_tensors())
    for name, weight in weights.items():
        assert relative_difference(weight, expected_weights[name]) < 1e-5, name


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_splitting_into_other_microbatches_changes_nothing(model_path: str, aggregation: str) -> None:
    loss = dataclasses.replace(LOSS, aggregation=aggregation, max_tokens=80)
    whole = train(training_config(model_path, tokens_per_microbatch=100_000), loss=loss)
    assert_same_training(train(training_config(model_path, tokens_per_microbatch=85), loss=loss), whole)
    assert_same_training(train(training_config(model_path, tokens_per_microbatch=1), loss=loss), whole)


@pytest.mark.parametrize("option", [{"gradient_checkpointing": True}, {"logits_chunk_tokens": 7}])
def test_what_saves_memory_changes_nothing(model_path: str, option: dict[str, object]) -> None:
    assert_same_training(train(training_config(model_path, model=option)), train(training_config(model_path)))


def test_switches_that_are_left_to_the_plan_are_off_where_none_was_made(model_path: str) -> None:
    config = training_config(model_path)
    assert (config.model.gradient_checkpointing, config.actor.offload_parameters) == ("auto", "auto")
    worker = actor_of(config)
    assert not worker.model.causal_lm.is_gradient_checkpointing
    moved: list[object] = []
    worker.model.to = moved.append  # type: ignore[method-assign, assignment]
    worker.core.onload(with_optimizer=True)
    worker.core.offload()
    assert not moved


def test_offloading_changes_nothing(model_path: str) -> None:
    offloaded = train(training_config(model_path, offload_parameters=True, offload_optimizer=True))
    assert_same_training(offloaded, train(training_config(model_path)))


def test_one_update_is_plain_adamw_on_the_clipped_gradient(model_path: str) -> None:
    """The slow way: Hugging Face's model, one row at a time, torch's own clipping and optimizer."""
    batch = random_batch(LENGTHS)
    actor = actor_of(training_config(model_path, max_grad_norm=0.5, weight_decay=0.1))
    metrics = actor.update(batch, loss=NextTokenLoss())

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    total = torch.zeros(())
    for prompt, response in zip(batch.tokens("prompt"), batch.tokens("response"), strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        log_probs_TV = torch.log_softmax(model(ids[None]).logits[0] / 0.9, -1)
        total = total - log_probs_TV[len(prompt) - 1 : -1].gather(1, ids[len(prompt) :, None]).sum()
    loss = total / batch["response_tokens"].sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3).step()

    assert metrics["actor/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    expected = dict(model.named_parameters())
    for name, weight in whole_weights(actor.named_tensors()).items():
        assert relative_difference(weight, expected[name].detach()) < 1e-5, name


def test_log_probs_come_back_in_the_order_of_the_rows(model_path: str) -> None:
    batch = random_batch(LENGTHS)
    in_one, in_parts = (actor_of(training_config(model_path, tokens_per_microbatch=budget)) for budget in (100_000, 50))
    whole, split = in_one.log_probs(batch), in_parts.log_probs(batch)
    assert split.tokens("log_probs").lengths.tolist() == batch["response_tokens"].tolist()
    np.testing.assert_allclose(split.tokens("log_probs").values, whole.tokens("log_probs").values, atol=1e-5)
    assert dict(in_parts.context.take_reported()) == pytest.approx(dict(in_one.context.take_reported()), rel=1e-5)


def test_entropy_is_that_of_the_distribution_at_temperature(model_path: str) -> None:
    batch = random_batch([(4, 3)])
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.from_numpy(np.concatenate([batch.tokens("prompt")[0], batch.tokens("response")[0]]).astype(np.int64))
    log_probs_TV = torch.log_softmax(model(ids[None]).logits[0, 3:6] / 0.9, -1)
    expected = -(log_probs_TV.exp() * log_probs_TV).sum(-1).mean().item()
    actor = actor_of(training_config(model_path))
    actor.log_probs(batch)
    assert actor.context.take_reported()["actor/entropy"] == pytest.approx(expected, rel=1e-5)


def test_the_reference_agrees_with_the_untrained_actor(model_path: str) -> None:
    config, batch = training_config(model_path), random_batch(LENGTHS)
    reference = ReferenceWorker(config, context_of("reference")).log_probs(batch)
    actor = actor_of(config).log_probs(batch)
    np.testing.assert_allclose(
        reference.tokens("reference_log_probs").values, actor.tokens("log_probs").values, rtol=0, atol=1e-6
    )


def test_rows_without_a_response_and_batches_without_rows_do_not_crash(model_path: str) -> None:
    actor = actor_of(training_config(model_path))
    assert actor.log_probs(random_batch([(3, 0), (2, 4)])).tokens("log_probs").lengths.tolist() == [0, 4]
    assert actor.log_probs(random_batch([(3, 0)])).tokens("log_probs").lengths.tolist() == [0]
    assert len(actor.log_probs(random_batch([]))) == 0
    assert actor.update(random_batch([(3, 0)]), loss=LOSS)["actor/grad_norm"] == 0.0


def test_the_critic_learns_the_returns(model_path: str) -> None:
    critic = CriticWorker(training_config(model_path, learning_rate=3e-3), context_of("critic"))
    batch = random_batch(LENGTHS)
    assert not critic.values(batch).tokens("values").values.any()
    losses = [critic.update(batch, loss=ValueLoss(clip=None))["critic/loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    error = critic.values(batch).tokens("values").values - batch.tokens("returns").values
    assert 0.5 * np.square(error).mean() == pytest.approx(losses[-1], rel=0.3)


def test_a_missing_column_is_named_with_its_writer(model_path: str) -> None:
    full = random_batch(LENGTHS)
    columns = {name: full.tokens(name) for name in ("prompt", "response", "log_probs")}
    with pytest.raises(BatchError, match=r"'advantages' is missing: it is written by"):
        actor_of(training_config(model_path)).update(Batch.from_columns(columns), loss=PolicyLoss())


def test_a_gradient_that_is_not_finite_changes_no_weight_and_is_counted(model_path: str) -> None:
    actor = actor_of(training_config(model_path))
    before = whole_weights(actor.named_tensors())
    batch = random_batch(LENGTHS)
    broken = batch.with_columns(advantage=np.where(np.arange(len(batch)) == 3, np.inf, 0.0).astype(np.float32))
    loss = PolicyLoss(advantage="advantage", old_log_probs="current")
    metrics = actor.update(broken, loss=loss)
    assert metrics["actor/skipped_updates"] == 1.0
    for name, weight in whole_weights(actor.named_tensors()).items():
        assert torch.equal(weight, before[name]), name
    assert actor.update(batch, loss=loss)["actor/skipped_updates"] == 0.0
    assert any(not torch.equal(weight, before[name]) for name, weight in whole_weights(actor.named_tensors()).items())


def test_only_adapters_train_and_merged_weights_move(model_path: str) -> None:
    actor = actor_of(training_config(model_path, model={"lora_rank": 4}))
    before = whole_weights(actor.named_tensors())
    assert actor.update(random_batch(LENGTHS), loss=LOSS)["actor/grad_norm"] > 0
    after = whole_weights(actor.named_tensors())
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if "_proj.weight" in name}


def test_a_state_saved_and_restored_trains_on_bit_for_bit(model_path: str, tmp_path: Path) -> None:
    config = training_config(model_path)
    actor, _ = train(config)
    actor.save(str(tmp_path))
    batch = random_batch(LENGTHS, seed=9)
    expected_metrics = actor.update(batch, loss=LOSS)

    resumed = actor_of(config)
    resumed.restore(str(tmp_path))
    resumed.begin_step(3, 3)
    assert dict(resumed.update(batch, loss=LOSS)) == dict(expected_metrics)
    expected = whole_weights(actor.named_tensors())
    for name, weight in whole_weights(resumed.named_tensors()).items():
        assert torch.equal(weight, expected[name]), name


def test_the_state_of_another_role_is_refused(model_path: str, tmp_path: Path) -> None:
    config = training_config(model_path)
    actor_of(config).save(str(tmp_path))
    with pytest.raises(CheckpointError):
        CriticWorker(config, context_of("critic")).restore(str(tmp_path))


def rates(total_steps: int, **options: object) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **options)
    return [learning_rate(config, step, total_steps) for step in range(1, total_steps + 1)]


def test_the_rate_warms_up_to_the_peak_and_stays() -> None:
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_linear_schedule_falls_by_equal_steps() -> None:
    # Two steps of warm-up, then four: 1, 3/4, 2/4, 1/4 of the way from the floor of 0.2 to 1.
    assert rates(6, warmup_steps=2, schedule="linear", min_learning_rate_ratio=0.2) == pytest.approx(
        [0.5, 1.0, 1.0, 0.8, 0.6, 0.4]
    )


def test_a_cosine_schedule_is_half_way_in_the_middle() -> None:
    # cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4), shifted to [0, 1].
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


def test_a_constant_schedule_has_no_floor() -> None:
    assert rates(3, min_learning_rate_ratio=0.1) == [1.0, 1.0, 1.0]


def test_present_log_probs_are_not_taken_for_those_of_older_weights(model_path: str) -> None:
    stale = dataclasses.replace(training_config(model_path), loop=LoopConfig(max_staleness=1))
    batch = random_batch([(3, 5), (1, 1)], seed=0)
    with pytest.raises(BatchError, match=r"loop\.max_staleness=1 older weights have sampled"):
        actor_of(stale).update(batch, loss=dataclasses.replace(LOSS, old_log_probs="current"))
    assert "actor/loss" in actor_of(stale).update(batch, loss=LOSS), "those of before the updates are taken"
