"""The actor's weights in real engines, one process: they arrive, and what goes wrong on the way is caught."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.distributed.tensor import DTensor

from hybridflow.config.schema import Config, DataConfig, ModelConfig, RolloutConfig
from hybridflow.errors import WeightMismatchError
from hybridflow.parallel.layout import Layout
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.base import RankContext, Worker
from hybridflow.workers.rollout import RolloutWorker
from tests.toy import make_tiny_model

NO_VLLM = importlib.util.find_spec("vllm") is None
ENGINES = [
    "torch",
    pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.skipif(NO_VLLM, reason="NOT RUN: vLLM is not installed")]),
]
SQUARE = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=ENGINES)
def workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Worker]]:
    """Actor and rollout in this process. Hidden size = heads x head size, so that q_proj is square."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
    config = Config(
        model=ModelConfig(path=folder),
        data=DataConfig(max_prompt_tokens=400, max_response_tokens=100),
        rollout=RolloutConfig(engine=request.param, max_num_seqs=4, cpu_cache_gib=0.1, sync_bucket_mib=1),
    )
    roles: dict[str, Worker] = {}
    for role, kind in (("actor", ActorWorker), ("rollout", RolloutWorker)):
        context = RankContext(role=role, rank=0, layout=Layout(), device=torch.device("cpu"), peers=roles)
        roles[role] = kind(config, context)
    yield roles
    roles["rollout"].close()


def take_a_large_step(workers: dict[str, Worker]) -> None:
    """Move all of the actor's weights so far that log-probabilities change by tenths of a nat."""
    actor = workers["actor"]
    assert isinstance(actor, ActorWorker)
    with torch.no_grad():
        for _, tensor in actor.named_tensors():
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            local.add_(0.05 * torch.randn_like(local))


@pytest.fixture
def rollout(workers: dict[str, Worker]) -> RolloutWorker:
    """The rollout worker as at the start of a run, the actor having other weights than the engine."""
    rollout = workers["rollout"]
    assert isinstance(rollout, RolloutWorker)
    take_a_large_step(workers)
    rollout.weight_sync.num_syncs = 0
    return rollout


Weights = Iterable[tuple[str, torch.Tensor]]


@contextmanager
def loading(rollout: RolloutWorker, change: Callable[[Weights], Weights]) -> Iterator[None]:
    """Within the block the engine loads `change(weights)` in place of the weights."""
    with rollout.engine.paused() as engine:
        load = engine.load_weights
    engine.load_weights = lambda weights: load(change(weights))  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.load_weights = load  # type: ignore[method-assign]


def test_engine_and_trainer_agree_after_every_sync(rollout: RolloutWorker):
    for _ in range(2):
        metrics = rollout.sync_weights()
        assert metrics["sync/tensors_unreadable"] == 0
        assert rollout.weight_sync.probe_difference is not None and rollout.weight_sync.probe_difference < 1e-4


def test_a_transposed_matrix_is_caught(rollout: RolloutWorker):
    def transpose(weights: Weights) -> Weights:
        return ((name, tensor.T.contiguous() if name == SQUARE else tensor) for name, tensor in weights)

    with loading(rollout, transpose), pytest.raises(WeightMismatchError, match=SQUARE):
        rollout.sync_weights()


def test_a_tensor_left_at_its_old_value_is_caught(rollout: RolloutWorker, workers: dict[str, Worker]):
    rollout.sync_weights()
    with rollout.engine.paused() as engine:
        old = dict(engine.named_parameters())[SQUARE].clone()
    take_a_large_step(workers)

    def keep_old(weights: Weights) -> Weights:
        return ((name, old if name == SQUARE else tensor) for name, tensor in weights)

    with loading(rollout, keep_old), pytest.raises(WeightMismatchError, match=rf"1 of \d+ tensors differ .*{SQUARE}"):
        rollout.sync_weights()


@pytest.mark.vllm
@pytest.mark.skipif(NO_VLLM, reason="NOT RUN: vLLM is not installed")
def test_prefixes_cached_under_older_weights_are_caught(
    rollout: RolloutWorker, workers: dict[str, Worker], monkeypatch: pytest.MonkeyPatch
):
    if workers["rollout"].config.rollout.engine != "vllm":
        pytest.skip("the torch engine keeps no prefixes between requests")
    from hybridflow.rollout.vllm_engine import VllmEngine

    rollout.sync_weights()  # its probe fills the cache; the weights need not move for the next one to see that
    with rollout.engine.paused() as engine:
        assert isinstance(engine, VllmEngine)
        monkeypatch.setattr(engine.engine, "reset_prefix_cache", lambda: True)
    with pytest.raises(WeightMismatchError, match="256 of 300 probe tokens from its prefix cache"):
        rollout.sync_weights()
