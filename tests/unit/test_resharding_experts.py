"""Mixtures of experts in real engines: their weights arrive, and an engine that drops one expert is caught at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from hybridflow.config.schema import Config, DataConfig, ModelConfig, RolloutConfig
from hybridflow.errors import WeightMismatchError
from hybridflow.models.build import flip_signs
from hybridflow.parallel.layout import Layout
from hybridflow.workers import proof
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker
from tests.every_model import make_every
from tests.training_rows import whole_weights

NO_VLLM = importlib.util.find_spec("vllm") is None
needs_vllm = pytest.mark.skipif(NO_VLLM, reason="NOT RUN: vLLM is not installed")
Weights = Iterable[tuple[str, torch.Tensor]]
FOR_VLLM = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128, "moe_intermediate_size": 64, "sliding_window": None}
"""Sizes that vLLM's kernels on CPU take, and no window, which rows of the probe would exceed."""


def workers_on(folder: str, engine: str) -> dict[str, Worker]:
    config = Config(
        model=ModelConfig(path=folder),
        data=DataConfig(max_prompt_tokens=330, max_response_tokens=30),
        rollout=RolloutConfig(engine=engine, max_num_seqs=8, cpu_cache_gib=0.1, sync_bucket_mib=1),
    )
    roles: dict[str, Worker] = {}
    for role, kind in (("actor", ActorWorker), ("rollout", RolloutWorker)):
        context = RankContext(role=role, rank=0, layout=Layout(), device=torch.device("cpu"), peers=roles)
        roles[role] = kind(config, context)
    return roles


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    folder = make_every(request.param, tmp_path_factory.mktemp(request.param), **FOR_VLLM)
    assert folder is not None
    if not NO_VLLM:  # an engine of a dense model, built in this process before, has left no group for experts
        from vllm.distributed.parallel_state import destroy_model_parallel

        destroy_model_parallel()
    roles = workers_on(folder, "vllm")
    yield roles
    roles["rollout"].close()


def take_a_step(workers: dict[str, Worker]) -> None:
    actor = workers["actor"]
    assert isinstance(actor, ActorWorker)
    with torch.no_grad():
        for _, tensor in actor.named_tensors():
            local = tensor.to_local()  # type: ignore[attr-defined]
            local.add_(0.05 * torch.randn_like(local))


@pytest.mark.vllm
@needs_vllm
def test_trainer_and_engine_agree_after_each_sync(workers: dict[str, Worker]) -> None:
    rollout = workers["rollout"]
    assert isinstance(rollout, RolloutWorker)
    for _ in range(3):
        rollout.sync_weights()
        assert rollout.weight_sync.probe_difference is not None and rollout.weight_sync.probe_difference < 1e-4
        take_a_step(workers)


@pytest.mark.vllm
@needs_vllm
def test_an_engine_that_drops_one_expert_is_caught_at_the_first_sync(
    workers: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = workers["rollout"]
    assert isinstance(rollout, RolloutWorker)
    rollout.sync_weights()
    rollout.weight_sync.num_syncs = 0  # as at the start of a run, where the engine has the weights already
    with rollout.engine.paused() as engine:
        names = engine.expected_weights.checkpoint_names  # type: ignore[attr-defined]
    stream, old = names.stream, {}

    def drop_one(weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in stream(weights):
            is_dropped = ".layers.1." in name and ".experts.2." in name
            yield name, old.setdefault(name, tensor.clone()) if is_dropped else tensor

    monkeypatch.setattr(names, "stream", drop_one)
    with pytest.raises(WeightMismatchError, match=r"does not take their values: with other values of .*experts"):
        rollout.sync_weights()
    monkeypatch.undo()
    rollout.sync_weights()


def test_flipping_signs_twice_restores_every_bit(tmp_path: Path) -> None:
    folder = make_every("qwen3_moe", tmp_path)
    assert folder is not None
    actor = workers_on(folder, "torch")["actor"]
    assert isinstance(actor, ActorWorker)
    before = whole_weights(actor.named_tensors())
    names = [name for name in before if "experts" in name]
    flip_signs(actor.model, names)
    flipped = whole_weights(actor.named_tensors())
    assert all(torch.equal(flipped[name], before[name]) != (name in names) for name in before)
    flip_signs(actor.model, names)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole_weights(actor.named_tensors()).items())


def test_an_engine_that_shows_nothing_and_takes_nothing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_every("qwen3_moe", tmp_path)
    assert folder is not None
    rollout = workers_on(folder, "torch")["rollout"]
    assert isinstance(rollout, RolloutWorker)
    with rollout.engine.paused() as engine:
        monkeypatch.setattr(engine, "named_parameters", lambda: iter(()))
    rollout.sync_weights()
    assert rollout.weight_sync.probe_difference is not None and rollout.weight_sync.probe_difference < 1e-4

    rollout.weight_sync.num_syncs = 0
    own = engine.load_weights

    def takes_all_but_router(weights: Weights) -> None:
        held = dict(engine.model.named_parameters())  # type: ignore[attr-defined]
        own((name, held[name].clone() if ".mlp.gate." in name else tensor) for name, tensor in weights)

    monkeypatch.setattr(engine, "load_weights", takes_all_but_router)
    with pytest.raises(WeightMismatchError, match=r"with other values of model\.layers\.\*\.mlp\.gate\.weight its"):
        rollout.sync_weights()


def test_kinds_are_weights_that_differ_in_numbers() -> None:
    names = ["layers.0.q.weight", "layers.11.q.weight", "head.weight"]
    assert list(proof.kinds_of(names)) == ["layers.*.q.weight", "head.weight"]
