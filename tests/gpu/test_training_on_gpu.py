"""Training on CUDA: packed kernels against padded attention, offloading, compiled layers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from hybridflow.config.schema import Config
from hybridflow.metrics import Metrics
from hybridflow.models.attention import flash_attention
from hybridflow.ops.losses import PolicyLoss
from hybridflow.workers.actor import ActorWorker
from tests.training_rows import context_of, model_without_zero_weights, random_batch, training_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LENGTHS = [(3, 5), (1, 200), (180, 1), (9, 9), (2, 7), (30, 30), (1, 1), (4, 0)]
LOSS = PolicyLoss(kl_coefficient=0.1, entropy_coefficient=0.01)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return model_without_zero_weights(str(tmp_path_factory.mktemp("model")))


def actor_of(config: Config, device: str = "cuda") -> ActorWorker:
    device_of_rank = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    return ActorWorker(config, dataclasses.replace(context_of("actor"), device=device_of_rank))


def train(config: Config) -> tuple[list[Metrics], dict[str, torch.Tensor]]:
    actor = actor_of(config)
    metrics = [actor.update(random_batch(LENGTHS, seed=seed), loss=LOSS) for seed in range(3)]
    return metrics, {name: tensor.full_tensor().cpu() for name, tensor in actor.named_tensors()}


def log_probs(actor: ActorWorker) -> np.ndarray:
    return actor.log_probs(random_batch(LENGTHS)).tokens("log_probs").values


def test_the_packed_kernel_computes_what_padded_attention_computes(path: str) -> None:
    exact = log_probs(actor_of(training_config(path, model={"compute_dtype": "float32"})))
    packed = log_probs(actor_of(training_config(path)))
    # The tiny model's logits are large: bfloat16 keeps 8 bits of numbers up to 10.
    assert np.abs(packed - exact).mean() < 0.05
    assert np.corrcoef(packed, exact)[0, 1] > 0.999


def test_offloading_changes_nothing_and_frees_memory(path: str) -> None:
    resident, offloaded = (
        train(training_config(path)),
        train(training_config(path, offload_parameters=True, offload_optimizer=True)),
    )
    for one, other in zip(resident[0], offloaded[0], strict=True):
        assert one["actor/loss"] == pytest.approx(other["actor/loss"], rel=1e-3)
    for name, weight in resident[1].items():
        torch.testing.assert_close(offloaded[1][name], weight, rtol=1e-2, atol=1e-3)

    actor = actor_of(training_config(path, offload_parameters=True, offload_optimizer=True))
    assert all(tensor.to_local().device.type == "cpu" for _, tensor in actor.named_tensors())
    states = actor.core.optimizer.state.values()
    assert all(value.to_local().device.type == "cpu" for state in states for value in (state["exp_avg"], state["exp_avg_sq"]))


def test_compiled_layers_train_alike(path: str) -> None:
    plain, compiled = train(training_config(path)), train(training_config(path, model={"compile": True}))
    for one, other in zip(plain[0], compiled[0], strict=True):
        assert one["actor/loss"] == pytest.approx(other["actor/loss"], rel=0.05, abs=0.01)
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available() and flash_attention() is None, reason="NOT RUN: needs flash-attn")
@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attn_trains_like_torch(path: str, compiled: bool) -> None:
    by_torch, by_flash = (
        train(training_config(path, model={"attention": attention, "compile": compiled}))
        for attention in ("torch", "flash_attn")
    )
    for one, other in zip(by_torch[0], by_flash[0], strict=True):
        assert one["actor/loss"] == pytest.approx(other["actor/loss"], rel=0.05, abs=0.01)
        assert one["actor/grad_norm"] == pytest.approx(other["actor/grad_norm"], rel=0.05)
