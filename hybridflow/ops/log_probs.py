"""Log-probabilities of tokens straight from hidden states: output layer and log-softmax as one operation, in chunks.

The logits of all tokens, a float32 tensor of shape [T, V], would be the largest of the whole step: 12 GB for 20,000 tokens of
Qwen2.5. Here at most `chunk_tokens` rows of it exist, in forward as in backward, which computes them again.

C tokens of a chunk, H hidden channels, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

__all__ = ["LinearLogProbs", "linear_log_probs"]


def chunk_log_probs(logits_CV: Tensor, targets_C: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities of the targets, logsumexp, and entropies: each of shape [C]."""
    log_softmax_CV = torch.log_softmax(logits_CV, dim=-1)
    log_probs_C = log_softmax_CV.gather(1, targets_C[:, None])[:, 0]
    logsumexp_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - log_probs_C
    if not with_entropy:
        return log_probs_C, logsumexp_C, None
    return log_probs_C, logsumexp_C, -log_softmax_CV.exp().mul_(log_softmax_CV).sum(dim=-1)


def chunk_logit_gradients(
    logits_CV: Tensor, logsumexp_C: Tensor, gradient_C: Tensor, entropies: tuple[Tensor, Tensor] | None, dtype: torch.dtype
) -> Tensor:
    """Gradients with regard to the logits of all but the target tokens: shape [C, V], of type `dtype`.

    With p the softmax: -gradient p for the log-probabilities. `entropies` are the entropies and their gradients, which add
    -gradient p (log p + entropy). In place on what is made here, never on `logits_CV`: a compiler would have to write it back.
    """
    log_softmax_CV = logits_CV - logsumexp_C[:, None]
    gradients_CV = torch.empty_like(logits_CV, dtype=dtype)
    if entropies is None:
        return torch.mul(log_softmax_CV.exp_(), -gradient_C[:, None], out=gradients_CV)
    entropy_C, entropy_gradient_C = entropies
    p_CV = log_softmax_CV.exp()
    factor_CV = log_softmax_CV.add_(entropy_C[:, None]).mul_(-entropy_gradient_C[:, None]).sub_(gradient_C[:, None])
    return torch.mul(p_CV, factor_CV, out=gradients_CV)


@dataclass(frozen=True)
class ChunkKernels:
    """The two functions over a chunk's logits, as they are written or compiled."""

    log_probs: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor, Tensor | None]] = chunk_log_probs
    logit_gradients: Callable[[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, torch.dtype], Tensor] = (
        chunk_logit_gradients
    )


EAGER = ChunkKernels()


@cache
def compiled_kernels() -> ChunkKernels:
    """The kernels by torch.compile, which reads the logits once or twice instead of five times. Compiled on first use."""
    return ChunkKernels(torch.compile(chunk_log_probs), torch.compile(chunk_logit_gradients))


@dataclass(frozen=True, kw_only=True)
class LinearLogProbs:
    """`linear_log_probs` with its rarer options.

    >>> of_two_tokens = LinearLogProbs(chunk_tokens=1, with_entropy=True)
    >>> of_two_tokens(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]))  # a vocabulary of 4: -log 4 and log 4
    (tensor([-1.3863, -1.3863]), tensor([1.3863, 1.3863]))
    """

    temperature: float | Tensor = 1.0
    """Divides the logits, as in sampling: one number, or one for each token, shape [T]."""
    chunk_tokens: int = 4096
    """Tokens whose logits exist at once."""
    with_entropy: bool = False
    kernels: ChunkKernels = EAGER

    def __call__(
        self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, bias_V: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `linear_log_probs`, for an output layer that may have a bias."""
        assert hidden_TH.dtype == weight_VH.dtype, f"hidden states are {hidden_TH.dtype}, the output layer {weight_VH.dtype}"
        apply = cast(Callable[..., tuple[Tensor, Tensor | None]], _LinearLogProbs.apply)
        return apply(hidden_TH, weight_VH, bias_V, targets_T.long(), self)

    def logits(self, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, chunk: slice) -> Tensor:
        """Logits of a chunk in the type that reductions have: [C, V], newly made."""
        logits_CV = _product(hidden_TH[chunk], weight_VH.t())
        if bias_V is not None:
            logits_CV.add_(bias_V)
        if isinstance(self.temperature, Tensor):
            return logits_CV.div_(self.temperature[chunk, None])
        return logits_CV if self.temperature == 1.0 else logits_CV.div_(self.temperature)

    def chunks(self, num_tokens: int) -> Iterator[slice]:
        """The tokens of each chunk."""
        return (slice(start, start + self.chunk_tokens) for start in range(0, num_tokens, self.chunk_tokens))


def linear_log_probs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    chunk_tokens: int = 4096,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target and, where asked for, entropy of each distribution, in nats: float32, shape [T].

    The logits `hidden_TH @ weight_VH.T` are divided by `temperature` (a number, or shape [T]) as in sampling. Factors have the
    type of the inputs, sums and all that follows are float32; float64 inputs stay float64. Both results can be differentiated,
    once.
    """
    options = LinearLogProbs(temperature=temperature, chunk_tokens=chunk_tokens, with_entropy=with_entropy)
    return options(hidden_TH, weight_VH, targets_T)


if TYPE_CHECKING:

    class _Context(FunctionCtx):
        options: LinearLogProbs
        saved_tensors: tuple[Tensor, ...]
        needs_input_grad: tuple[bool, ...]


class _LinearLogProbs(Function):
    """The operation for autograd. Inputs: hidden_TH, weight_VH, bias_V, targets_T, options."""

    @staticmethod
    def forward(
        ctx: _Context, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, options: LinearLogProbs
    ) -> tuple[Tensor, Tensor | None]:
        log_probs_T = hidden_TH.new_empty(len(targets_T), dtype=_reduction_dtype(hidden_TH))
        logsumexp_T = torch.empty_like(log_probs_T)
        entropy_T = torch.empty_like(log_probs_T) if options.with_entropy else None
        for chunk in options.chunks(len(targets_T)):
            logits_CV = options.logits(hidden_TH, weight_VH, bias_V, chunk)
            log_probs_C, logsumexp_C, entropy_C = options.kernels.log_probs(logits_CV, targets_T[chunk], options.with_entropy)
            log_probs_T[chunk], logsumexp_T[chunk] = log_probs_C, logsumexp_C
            if entropy_T is not None and entropy_C is not None:
                entropy_T[chunk] = entropy_C
        ctx.options = options
        ctx.set_materialize_grads(False)
        saved = (hidden_TH, weight_VH, bias_V, targets_T, log_probs_T, logsumexp_T, entropy_T)
        ctx.save_for_backward(*cast(tuple[Tensor, ...], saved))  # what is None comes back as None
        return log_probs_T, entropy_T

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, log_probs_gradient_T: Tensor | None, entropy_gradient_T: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, bias_V, targets_T, log_probs_T, logsumexp_T, entropy_T = ctx.saved_tensors
        gradient_T = torch.zeros_like(log_probs_T) if log_probs_gradient_T is None else log_probs_gradient_T
        # The logits were divided by the temperature: divide here, where the gradient is one number per token.
        gradient_T = gradient_T / ctx.options.temperature
        at_target_T = -gradient_T * torch.expm1(log_probs_T)  # not 1 - p, which is 0 in bfloat16 from p = 0.998 on
        if entropy_gradient_T is not None:
            entropy_gradient_T = entropy_gradient_T / ctx.options.temperature
            at_target_T -= entropy_gradient_T * log_probs_T.exp() * (log_probs_T + entropy_T)
        totals = _Gradients(ctx.needs_input_grad, hidden_TH, weight_VH, bias_V)
        for chunk in ctx.options.chunks(len(targets_T)):
            logits_CV = ctx.options.logits(hidden_TH, weight_VH, bias_V, chunk)
            entropies = None if entropy_gradient_T is None else (entropy_T[chunk], entropy_gradient_T[chunk])
            gradients_CV = ctx.options.kernels.logit_gradients(
                logits_CV, logsumexp_T[chunk], gradient_T[chunk], entropies, hidden_TH.dtype
            )
            gradients_CV.scatter_(1, targets_T[chunk, None], at_target_T[chunk, None].to(gradients_CV.dtype))
            totals.add(chunk, gradients_CV)
        return *totals.results(), None, None


class _Gradients:
    """Gradients of hidden states, weight and bias, those of the latter two summed over chunks in the type of reductions."""

    def __init__(self, needs: tuple[bool, ...], hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None):
        dtype = _reduction_dtype(hidden_TH)
        self.inputs = hidden_TH, weight_VH, bias_V
        self.hidden_TH = torch.empty_like(hidden_TH) if needs[0] else None
        self.weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if needs[1] else None
        self.bias_V = torch.zeros_like(bias_V, dtype=dtype) if bias_V is not None and needs[2] else None

    def add(self, chunk: slice, logit_gradients_CV: Tensor) -> None:
        hidden_TH, weight_VH, _ = self.inputs
        if self.hidden_TH is not None:
            torch.mm(logit_gradients_CV, weight_VH, out=self.hidden_TH[chunk])
        if self.weight_VH is not None:
            _add_product(self.weight_VH, logit_gradients_CV.t(), hidden_TH[chunk])
        if self.bias_V is not None:
            self.bias_V += logit_gradients_CV.sum(dim=0, dtype=self.bias_V.dtype)

    def results(self) -> tuple[Tensor | None, ...]:
        pairs = zip((self.hidden_TH, self.weight_VH, self.bias_V), self.inputs, strict=True)
        return tuple(None if total is None or given is None else total.to(given.dtype) for total, given in pairs)


def _reduction_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product in the type of reductions; on CUDA the sums of half-precision products are not rounded on the way."""
    dtype = _reduction_dtype(left)
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add the product to `total`, which has the type of reductions."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.add_(torch.mm(left, right))
