"""The chunked output layer: values and gradients of the plain one, without its memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hybridflow import ops
from tests.reference.log_probs import log_probs_and_entropy

T, H, V = 10, 6, 17


def inputs(dtype: torch.dtype = torch.float64, size: tuple[int, int, int] = (T, H, V)) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, channels, vocabulary = size
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_tokens, channels, generator=generator, dtype=dtype)
    weight_VH = torch.randn(vocabulary, channels, generator=generator, dtype=dtype)
    targets_T = torch.randint(0, vocabulary, (num_tokens,), generator=generator, dtype=torch.int32)
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), targets_T


def plain(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The whole thing at once, by autograd."""
    log_softmax_TV = torch.log_softmax(hidden_TH @ weight_VH.t() / temperature, dim=-1)
    log_probs_T = log_softmax_TV.gather(1, targets_T.long()[:, None])[:, 0]
    return log_probs_T, -(log_softmax_TV.exp() * log_softmax_TV).sum(-1)


@pytest.mark.parametrize("chunk_tokens", [1, 3, T, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_are_those_of_the_definition(chunk_tokens: int, temperature: float):
    hidden_TH, weight_VH, targets_T = inputs()
    log_probs_T, entropy_T = ops.linear_log_probs(
        hidden_TH, weight_VH, targets_T, temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=True
    )
    arrays = hidden_TH.detach().numpy(), weight_VH.detach().numpy(), targets_T.numpy().astype(np.int64)
    expected_log_probs, expected_entropy = log_probs_and_entropy(*arrays, temperature)
    assert entropy_T is not None
    np.testing.assert_allclose(log_probs_T.detach().numpy(), expected_log_probs, rtol=1e-12)
    np.testing.assert_allclose(entropy_T.detach().numpy(), expected_entropy, rtol=1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 3, T])
@pytest.mark.parametrize("parts", ["log_probs", "entropy", "both"])
def test_gradients_are_those_of_finite_differences(chunk_tokens: int, parts: str):
    hidden_TH, weight_VH, targets_T = inputs(size=(4, 3, 5))

    def operation(hidden_TH: Tensor, weight_VH: Tensor) -> tuple[Tensor, ...]:
        log_probs_T, entropy_T = ops.linear_log_probs(
            hidden_TH, weight_VH, targets_T, temperature=0.7, chunk_tokens=chunk_tokens, with_entropy=parts != "log_probs"
        )
        chosen = {"log_probs": (log_probs_T,), "entropy": (entropy_T,), "both": (log_probs_T, entropy_T)}[parts]
        return tuple(result for result in chosen if result is not None)

    assert torch.autograd.gradcheck(operation, (hidden_TH, weight_VH))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_stays_near_float64(dtype: torch.dtype, tolerance: float):
    hidden_TH, weight_VH, targets_T = inputs(dtype, size=(64, 16, 50))
    results = ops.linear_log_probs(hidden_TH, weight_VH, targets_T, chunk_tokens=20, with_entropy=True)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden_TH, weight_VH)]
    expected = plain(exact[0], exact[1], targets_T)
    coefficients_T = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for result, wanted in zip(results, expected, strict=True):
        assert result is not None
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), wanted, atol=2 * tolerance, rtol=tolerance)
    gradients = torch.autograd.grad(sum((r * coefficients_T).sum() for r in results if r is not None), (hidden_TH, weight_VH))
    wanted = torch.autograd.grad(sum((r * coefficients_T).sum() for r in expected), exact)
    for gradient, expected_gradient in zip(gradients, wanted, strict=True):
        assert gradient.dtype == dtype
        assert (gradient - expected_gradient).norm() < tolerance * expected_gradient.norm()


def test_a_nearly_certain_target_keeps_its_gradient_in_bfloat16():
    # Two tokens, logits 7 and 0: p = 0.99909, which bfloat16 rounds to 1, but d log p / d logit = 1 - p = 0.00091.
    hidden_TH = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_VH = torch.eye(2, dtype=torch.bfloat16)
    log_probs_T, _ = ops.linear_log_probs(hidden_TH, weight_VH, torch.tensor([0]))
    (gradient_TH,) = torch.autograd.grad(log_probs_T.sum(), hidden_TH)
    one_less_p = 1.0 - 1.0 / (1.0 + np.exp(-7.0))
    torch.testing.assert_close(gradient_TH[0].float(), torch.tensor([one_less_p, -one_less_p]).float(), rtol=1e-2, atol=0.0)


def test_a_bias_of_the_output_layer_is_added_and_trained():
    hidden_TH, weight_VH, targets_T = inputs(size=(4, 3, 5))
    bias_V = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer = ops.LinearLogProbs(temperature=0.7, chunk_tokens=3)
    assert torch.autograd.gradcheck(lambda h, w, b: layer(h, w, targets_T, b)[0], (hidden_TH, weight_VH, bias_V))
    arrays = hidden_TH.detach().numpy(), weight_VH.detach().numpy(), targets_T.numpy().astype(np.int64)
    expected, _ = log_probs_and_entropy(*arrays, 0.7, bias_V.detach().numpy())
    np.testing.assert_allclose(layer(hidden_TH, weight_VH, targets_T, bias_V)[0].detach().numpy(), expected, rtol=1e-12)


def test_a_frozen_output_layer_gets_no_gradient():
    hidden_TH, weight_VH, targets_T = inputs()
    ops.linear_log_probs(hidden_TH, weight_VH.detach(), targets_T)[0].sum().backward()
    assert hidden_TH.grad is not None
    assert weight_VH.grad is None


def test_no_tokens_give_no_log_probs_and_a_gradient_of_zero():
    hidden_TH, weight_VH, targets_T = inputs(size=(0, H, V))
    log_probs_T, _ = ops.linear_log_probs(hidden_TH, weight_VH, targets_T)
    log_probs_T.sum().backward()
    assert len(log_probs_T) == 0
    assert weight_VH.grad is not None
    assert not weight_VH.grad.any()


class LargestTensor(TorchDispatchMode):
    """Notes the most elements of any tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def largest_tensor(operation: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> int:
    hidden_TH, weight_VH, targets_T = inputs(torch.float32, size=(64, 8, 100))
    with LargestTensor() as largest:
        log_probs_T, entropy_T = operation(hidden_TH, weight_VH, targets_T)
        assert entropy_T is not None
        (log_probs_T + entropy_T).sum().backward()
    return largest.num_elements


def test_no_tensor_of_all_logits_exists_in_forward_or_backward():
    chunked = largest_tensor(lambda *args: ops.linear_log_probs(*args, chunk_tokens=4, with_entropy=True))
    assert chunked == 8 * 100, "the largest is the gradient of the weight, twice as large as a chunk of logits"
    assert largest_tensor(plain) == 64 * 100, "the plain form makes it, or this test sees nothing"


def test_what_is_kept_for_backward_has_no_vocabulary_dimension_but_the_weight():
    hidden_TH, weight_VH, targets_T = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        ops.linear_log_probs(hidden_TH, weight_VH, targets_T, with_entropy=True)
    assert [tensor.shape for tensor in kept if V in tensor.shape] == [(V, H)]
    assert len(kept) > 3
