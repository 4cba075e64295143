"""Ulysses sequence parallelism: ranks share the tokens of a packed sequence, and trade tokens for heads around attention.

Jacobs et al. 2023, arXiv:2309.14509. S ranks, T tokens of the whole sequence, H heads, D channels of a head, R responses'
tokens. Outside attention each rank holds T / S consecutive tokens with all heads, inside all tokens with H / S heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hybridflow.errors import ModelError


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share the tokens of the same rows."""

    group: dist.ProcessGroup
    rank: int
    """Of this process on the sequence axis."""
    size: int

    def repeat_heads(self, states_THD: torch.Tensor, num_query_heads: int) -> torch.Tensor:
        """Key-value heads, repeated as often as it takes for every rank to get its share.

        Raises:
            ModelError: the heads of the model cannot be shared by this number of ranks.
        """
        num_heads = states_THD.shape[1]
        repeats = next(
            (n for n in range(1, num_query_heads // num_heads + 1) if self._can_share(num_heads * n, num_query_heads)), 0
        )
        if num_query_heads % self.size or not repeats:
            raise ModelError(
                f"model.sequence_parallel={self.size} cannot share {num_query_heads} attention heads over {num_heads} "
                "key-value heads. Use a divisor of the number of heads"
            )
        return states_THD.repeat_interleave(repeats, dim=1) if repeats > 1 else states_THD

    def _can_share(self, num_heads: int, num_query_heads: int) -> bool:
        return num_heads % self.size == 0 and num_query_heads % num_heads == 0

    def to_heads(self, states_THD: torch.Tensor) -> torch.Tensor:
        """[T / S, H, D] of this rank's tokens to [T, H / S, D] of this rank's heads."""
        moved: torch.Tensor = _Trade.apply(states_THD, self, True)  # type: ignore[no-untyped-call]
        return moved

    def to_tokens(self, states_THD: torch.Tensor) -> torch.Tensor:
        """The way back: [T, H / S, D] to [T / S, H, D]."""
        moved: torch.Tensor = _Trade.apply(states_THD, self, False)  # type: ignore[no-untyped-call]
        return moved

    def gather(self, part_R: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """All ranks' parts, of the given sizes, in the order of the ranks; each rank gets the whole.

        The gradient of a rank's part is taken from its own copy of the whole: every rank is to compute the same loss from
        it, and none of them counts twice when gradients are summed over ranks.
        """
        whole: torch.Tensor = _Gather.apply(part_R, self, tuple(sizes))  # type: ignore[no-untyped-call]
        return whole


class _Trade(torch.autograd.Function):
    """Tokens for heads where `to_heads`, else heads for tokens; each is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, states_THD: torch.Tensor, ranks: SequenceGroup, to_heads: bool) -> torch.Tensor:
        ctx.ranks, ctx.to_heads = ranks, to_heads
        return _trade(states_THD, ranks, to_heads=to_heads)

    @staticmethod
    def backward(ctx: Any, grad_THD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _trade(grad_THD.contiguous(), ctx.ranks, to_heads=not ctx.to_heads), None, None


def _trade(states_THD: torch.Tensor, ranks: SequenceGroup, *, to_heads: bool) -> torch.Tensor:
    tokens, heads, channels = states_THD.shape
    if to_heads:
        sent = states_THD.view(tokens, ranks.size, heads // ranks.size, channels).transpose(0, 1).contiguous()
    else:
        sent = states_THD.contiguous().view(ranks.size, tokens // ranks.size, heads, channels)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ranks.group)
    if to_heads:
        return received.view(tokens * ranks.size, heads // ranks.size, channels)
    return received.transpose(0, 1).reshape(tokens // ranks.size, heads * ranks.size, channels)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part_R: torch.Tensor, ranks: SequenceGroup, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.start, ctx.stop = sum(sizes[: ranks.rank]), sum(sizes[: ranks.rank + 1])
        padded = part_R.new_zeros(max(sizes))
        padded[: len(part_R)] = part_R
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=ranks.group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_R: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_R[ctx.start : ctx.stop], None, None
