"""PPO and GRPO on groups of real models in this process: which passes a step makes, and what they are good for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hybridflow.algorithms import grpo, ppo
from hybridflow.algorithms.base import Algorithm
from hybridflow.batch import Batch
from hybridflow.config.schema import AlgorithmConfig, DataConfig
from hybridflow.metrics import Metrics
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import Worker
from hybridflow.workers.critic import CriticWorker
from hybridflow.workers.reference import ReferenceWorker
from hybridflow.workers.remote import remote
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker
from hybridflow.workers.token_functions import count_loss_tokens
from tests.training_rows import (
    context_of,
    disturbed,
    masked,
    model_without_zero_weights,
    random_batch,
    relative_difference,
    training_config,
    whole_weights,
)
from tests.unit.local_groups import LocalDispatcher

RESPONSES_PER_PROMPT = 2
RESPONSES = random_batch([(3, 5), (3, 40), (20, 1), (20, 9)])
PROMPTS = RESPONSES.select([0, 2]).with_columns(group=np.array([0, 1]))


class FixedResponses(RolloutWorker):
    """Answers with `RESPONSES`, whatever the prompts."""

    __init__ = Worker.__init__
    answers_row_by_row = False

    @remote("split_by_data_rank")
    def generate(self, batch: Batch, *, sampling: object = None) -> Batch:
        names = ("response", "response_tokens", "rollout_log_probs", "loss_mask", "loss_tokens")
        return only(RESPONSES, *(name for name in names if name in RESPONSES))


class LengthAsReward(RewardWorker):
    """Scores a response by its number of tokens."""

    scores_whole_batches = False
    __init__ = Worker.__init__

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        return Batch.from_columns({"reward": batch["response_tokens"].astype(np.float32)})


def only(batch: Batch, *names: str) -> Batch:
    return Batch.from_columns({name: batch[name] if name in batch.per_row else batch.tokens(name) for name in names})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


@dataclasses.dataclass
class Run:
    """An algorithm after its steps."""

    groups: dict[str, Worker]
    actor: ActorWorker
    batch: Batch
    metrics: Metrics

    def calls(self, role: str) -> list[str]:
        return dispatcher_of(self, role).called


def run(path: str, algorithm: type[Algorithm], *, steps: int = 1, **options: object) -> Run:
    """Run steps of two prompts; every role is on a pool of its own."""
    config = dataclasses.replace(
        training_config(path, tokens_per_microbatch=48),
        algorithm=AlgorithmConfig(options=algorithm.config_class(responses_per_prompt=RESPONSES_PER_PROMPT, **options)),
        data=DataConfig(prompts_per_step=len(PROMPTS)),
    )
    classes = {
        "actor": ActorWorker,
        "critic": CriticWorker,
        "reference": ReferenceWorker,
        "rollout": FixedResponses,
        "reward": LengthAsReward,
    }
    workers = {role: classes[role](config, context_of(role)) for role in algorithm.roles(config)}
    groups = {role: type(one).group(LocalDispatcher([one], Layout(), pool_name=role)) for role, one in workers.items()}
    built = algorithm(config, groups)
    for step in range(1, steps + 1):
        built.step = step
        batch = built.collect(only(PROMPTS, "prompt", "prompt_tokens", "group"))
        metrics = built.learn(batch)
    actor = workers["actor"]
    assert isinstance(actor, ActorWorker)
    return Run(groups, actor, batch, metrics)


IN_LOSS = {"kl_in": "loss", "kl_estimator": "k3", "kl_coefficient": 0.1}
CAPPED = {"importance_cap": 2.0}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (ppo.PPO, {"kl_in": "none"}),
        (ppo.PPO, {"kl_in": "none", "prompts_per_update": 2}),
        (ppo.PPO, IN_LOSS),
        (ppo.PPO, {"kl_in": "none", **CAPPED}),
        (ppo.PPO, {"kl_in": "none", "epochs": 2, "old_log_probs": "rollout"}),
        (ppo.PPO, {"kl_in": "reward", "old_log_probs": "rollout"}),
        (grpo.GRPO, {}),
        (grpo.GRPO, CAPPED),
    ],
)
def test_old_log_probs_cost_no_pass_where_the_update_knows_them(
    model_path: str, algorithm: type[Algorithm], options: dict[str, object]
) -> None:
    assert set(run(model_path, algorithm, **options).calls("actor")) == {"update"}


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (ppo.PPO, {"kl_in": "reward"}),
        (ppo.PPO, {"kl_in": "none", "epochs": 2}),
        (ppo.PPO, {"kl_in": "none", "prompts_per_update": 1}),
        (ppo.PPO, {**IN_LOSS, "epochs": 2}),
        (grpo.GRPO, {"epochs": 2}),
        (grpo.GRPO, {"prompts_per_update": 1}),
    ],
)
def test_old_log_probs_are_computed_once_where_the_policy_moves_away_or_the_reward_needs_them(
    model_path: str, algorithm: type[Algorithm], options: dict[str, object]
) -> None:
    calls = run(model_path, algorithm, **options).calls("actor")
    assert calls[0] == "log_probs" and set(calls[1:]) == {"update"}


def test_the_actor_rests_while_the_critic_warms_up_unless_the_reward_needs_it(model_path: str) -> None:
    warm_up = {"critic_warmup_steps": 1, "epochs": 2}
    assert run(model_path, ppo.PPO, kl_in="none", **warm_up).calls("actor") == []
    assert run(model_path, ppo.PPO, **IN_LOSS, **warm_up).calls("actor") == []
    assert run(model_path, ppo.PPO, kl_in="reward", **warm_up).calls("actor") == ["log_probs"]
    two_steps = run(model_path, ppo.PPO, kl_in="none", steps=2, **warm_up)
    assert two_steps.calls("actor") == ["log_probs", "update", "update"], "the second step trains the policy, twice"
    assert two_steps.calls("critic").count("update") == 4


@pytest.mark.parametrize("options", [{"kl_in": "none"}, IN_LOSS, {"kl_in": "none", **CAPPED}, {**IN_LOSS, "dual_clip": 3.0}])
def test_the_only_update_gives_the_weights_that_recomputed_old_log_probs_give(
    model_path: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    known = run(model_path, ppo.PPO, **options)
    monkeypatch.setattr(ppo.Config, "makes_one_update", lambda self, run: False)
    recomputed = run(model_path, ppo.PPO, **options)
    assert "log_probs" not in known.calls("actor") and "log_probs" in recomputed.calls("actor")
    expected = whole_weights(recomputed.actor.named_tensors())
    before = whole_weights(ActorWorker(known.actor.config, context_of("actor")).named_tensors())
    for name, weight in whole_weights(known.actor.named_tensors()).items():
        assert relative_difference(weight.detach(), expected[name].detach()) < 1e-6, name
        assert not torch.equal(weight, before[name]), name
    assert known.metrics["actor/grad_norm"] == pytest.approx(recomputed.metrics["actor/grad_norm"], rel=1e-5)


def test_the_kl_to_the_reference_is_told_without_the_trainers_log_probs_too(model_path: str) -> None:
    found = run(model_path, ppo.PPO, **IN_LOSS)
    reference = ReferenceWorker(found.actor.config, context_of("reference")).log_probs(found.batch)
    log_ratio = reference.tokens("reference_log_probs").values - found.batch.tokens("rollout_log_probs").values
    # k3 of Schulman 2020: r - 1 - log r with r = reference / policy, here the engine's.
    assert found.metrics["kl/mean"] == pytest.approx(float(np.mean(np.exp(log_ratio) - 1 - log_ratio)), rel=1e-4)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        (ppo.PPO, {"kl_in": "reward"}),
        (ppo.PPO, {"kl_in": "none", "epochs": 2, **CAPPED}),
        (ppo.PPO, {"kl_in": "reward", "old_log_probs": "rollout"}),
        (grpo.GRPO, {"kl_coefficient": 0.1}),
        (grpo.GRPO, {"prompts_per_update": 1, **CAPPED}),
    ],
)
def test_what_stands_at_a_masked_token_changes_no_bit_of_a_step(
    model_path: str, monkeypatch: pytest.MonkeyPatch, algorithm: type[Algorithm], options: dict[str, object]
) -> None:
    with_mask = masked(RESPONSES)
    with_mask = with_mask.join(count_loss_tokens(with_mask, context_of("data")))
    found = []
    for responses in (with_mask, disturbed(with_mask), RESPONSES):
        monkeypatch.setattr(f"{__name__}.RESPONSES", responses)
        ended = run(model_path, algorithm, **options)
        workers = [dispatcher_of(ended, role).workers[0] for role in ended.groups]
        trained = [worker.core for worker in workers if isinstance(worker, ActorWorker | CriticWorker)]
        told = ended.metrics + dispatcher_of(ended, "actor").reported
        found.append((told, [whole_weights(core.named_tensors()) for core in trained]))
    (told, weights), (other_told, other_weights), (unmasked, _) = found
    assert dict(told) == dict(other_told) and np.isfinite(list(told.values())).all()
    for one, other in zip(weights, other_weights, strict=True):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert told["actor/grad_norm"] != pytest.approx(unmasked["actor/grad_norm"], rel=1e-3), "the mask matters"


def dispatcher_of(ended: Run, role: str) -> LocalDispatcher:
    dispatcher = ended.groups[role].dispatcher
    assert isinstance(dispatcher, LocalDispatcher)
    return dispatcher
