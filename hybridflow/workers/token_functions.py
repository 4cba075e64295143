"""Functions over a whole step that run where the data is: `group.compute(batch, TokenAdvantages(...))`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hybridflow import ops
from hybridflow.batch import Batch, Ragged

if TYPE_CHECKING:
    import torch

    from hybridflow.workers.base import RankContext


@dataclass(frozen=True, kw_only=True)
class TokenAdvantages:
    """Advantages and returns of every response token by generalised advantage estimation.

    Reads `reward`, `values` and, where the batch has them, `reference_log_probs` with the column named `log_probs`.
    Writes `advantages`, `returns`, and the light column `kl`: mean KL to the reference per token of each row, in nats.
    """

    gamma: float
    lam: float
    whiten: bool
    """Over all tokens of all ranks."""
    kl_coefficient: float
    """Weight of the KL in each token's reward; 0 leaves the reward alone."""
    kl_estimator: Literal["k1", "k2", "k3"]
    log_probs: str
    """Column with the policy's log-probabilities."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        import torch

        values = batch.tokens("values")
        offsets_B1 = torch.tensor(values.offsets)
        rewards_T = ops.token_rewards(torch.tensor(batch["reward"]), offsets_B1)
        light = {}
        if "reference_log_probs" in batch:
            log_probs_T, reference_T = (_tensor(batch, name) for name in (self.log_probs, "reference_log_probs"))
            kl_T = ops.kl_estimate(log_probs_T, reference_T, self.kl_estimator)
            light["kl"] = ops.row_means(kl_T, offsets_B1.diff()).numpy()
            rewards_T = ops.kl_in_reward(rewards_T, kl_T, self.kl_coefficient)
        advantages_T, returns_T = ops.gae(rewards_T, _tensor(batch, "values"), offsets_B1, gamma=self.gamma, lam=self.lam)
        if self.whiten:
            advantages_T = ops.whiten(advantages_T, lambda sums: _sum_over_ranks(sums, context))
        columns = {"advantages": advantages_T, "returns": returns_T}
        return Batch.from_columns(
            {**light, **{name: Ragged(column.numpy(), values.offsets) for name, column in columns.items()}}
        )


def _tensor(batch: Batch, name: str) -> torch.Tensor:
    import torch

    return torch.tensor(batch.tokens(name).values)  # a copy: shards are read-only, and torch has no read-only tensors


def _sum_over_ranks(sums: torch.Tensor, context: RankContext) -> torch.Tensor:
    import torch.distributed as dist

    if context.group is None:
        return sums
    on_device = sums.to(context.device)  # NCCL reduces nothing on the CPU
    dist.all_reduce(on_device, group=context.group)
    return on_device.to(sums.device)


@dataclass(frozen=True)
class CopyObjects:
    """Copies columns of objects, so that a few rows can be fetched without the shards they stand in."""

    names: tuple[str, ...]

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        return Batch.from_columns({name: list(batch.objects(name)) for name in self.names})
