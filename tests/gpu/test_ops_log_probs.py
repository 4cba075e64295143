"""The chunked output layer in bfloat16 on CUDA, eager and compiled, against float64."""

from __future__ import annotations

import pytest
import torch

from hybridflow.ops.log_probs import EAGER, ChunkKernels, LinearLogProbs, compiled_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: needs a CUDA device")]

T, H, V = 300, 64, 1000


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden_TH = torch.randn(T, H, generator=generator, device="cuda").bfloat16().to(dtype).requires_grad_()
    weight_VH = torch.randn(V, H, generator=generator, device="cuda").bfloat16().to(dtype).div_(4).requires_grad_()
    return hidden_TH, weight_VH, torch.randint(0, V, (T,), generator=generator, device="cuda")


def results_and_gradients(dtype: torch.dtype, *, with_entropy: bool, kernels: ChunkKernels = EAGER) -> list[torch.Tensor]:
    hidden_TH, weight_VH, targets_T = inputs(dtype)
    layer = LinearLogProbs(temperature=0.8, chunk_tokens=128, with_entropy=with_entropy, kernels=kernels)
    log_probs_T, entropy_T = layer(hidden_TH, weight_VH, targets_T)
    total = (log_probs_T * torch.linspace(-1, 1, T, device="cuda")).sum()
    if entropy_T is not None:
        total = total + 0.5 * entropy_T.sum()
    gradients = torch.autograd.grad(total, (hidden_TH, weight_VH))
    return [log_probs_T.detach(), *([entropy_T.detach()] if entropy_T is not None else []), *gradients]


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_products_are_summed_in_float32(with_entropy: bool, compiled: bool):
    kernels = compiled_kernels() if compiled else EAGER
    found = results_and_gradients(torch.bfloat16, with_entropy=with_entropy, kernels=kernels)
    exact = results_and_gradients(torch.float64, with_entropy=with_entropy)
    num_gradients = 2
    for result, wanted in zip(found[:-num_gradients], exact[:-num_gradients], strict=True):
        torch.testing.assert_close(result.double(), wanted, atol=1e-4, rtol=1e-4)  # bfloat16 logits would be off by 0.03
    for result, wanted in zip(found[-num_gradients:], exact[-num_gradients:], strict=True):
        assert (result.double() - wanted).norm() < 5e-3 * wanted.norm()  # logit gradients travel in bfloat16


def test_a_forward_and_backward_do_not_wait_for_the_device():
    results_and_gradients(torch.bfloat16, with_entropy=True)  # first use of libraries may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        results_and_gradients(torch.bfloat16, with_entropy=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
