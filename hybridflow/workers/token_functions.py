"""Functions over a whole step that run where the data is: `group.compute(batch, TokenAdvantages(...))`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from hybridflow import ops
from hybridflow.batch import Batch, Ragged
from hybridflow.config.choices import KLEstimator
from hybridflow.metrics import Metric, Metrics
from hybridflow.workers.mismatch import sampled_tokens

if TYPE_CHECKING:
    import torch

    from hybridflow.workers.base import RankContext


@dataclass(frozen=True, kw_only=True)
class TokenAdvantages:
    """Advantages and returns of every response token by generalised advantage estimation.

    Only tokens that the policy sampled count: the next state after one is the next sampled token, and the reward is at the
    last. Reads `reward`, `values` and, where the batch has them, `loss_mask` and `reference_log_probs` with the column named
    `log_probs`. Without a critic all values are 0: with `lam` 1 the advantage of a token is the discounted sum of the rewards
    from it on.
    Writes `advantages`, `returns`, and the per-row column `kl`: mean KL to the reference per token of each row, in nats.
    Reports `kl/mean` of all.
    """

    gamma: float
    lam: float
    whiten: bool
    """Over all tokens of all ranks."""
    kl_coefficient: float
    """Weight of the KL in each token's reward; 0 leaves the reward alone."""
    kl_estimator: KLEstimator
    log_probs: str
    """Column with the policy's log-probabilities."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        import torch

        sampled = sampled_tokens(batch, batch.tokens("response"))
        offsets_B1 = torch.tensor(sampled.offsets)
        values_T = _tensor(batch, "values") if "values" in batch else torch.zeros(len(sampled.values))
        rewards_T = ops.token_rewards(torch.tensor(batch["reward"]), offsets_B1)
        if "token_rewards" in batch:  # of turns; what the reward role has added to their sum stays at the last token
            turns_T = _tensor(batch, "token_rewards")
            rewards_T = ops.token_rewards(torch.tensor(batch["reward"]) - ops.row_sums(turns_T, offsets_B1.diff()), offsets_B1)
            rewards_T = rewards_T + turns_T
        of_rows = {}
        if "reference_log_probs" in batch:
            log_probs_T, reference_T = (_tensor(batch, name) for name in (self.log_probs, "reference_log_probs"))
            kl_T = ops.kl_estimate(log_probs_T, reference_T, self.kl_estimator)
            of_rows["kl"] = ops.row_means(kl_T, offsets_B1.diff()).numpy()
            context.report(Metrics({"kl/mean": Metric(float(kl_T.sum(dtype=torch.float64)), float(len(kl_T)))}))
            rewards_T = ops.kl_in_reward(rewards_T, kl_T, self.kl_coefficient)
        advantages_T, returns_T = ops.gae(rewards_T, values_T, offsets_B1, gamma=self.gamma, lam=self.lam)
        if self.whiten:
            advantages_T = ops.whiten(advantages_T, lambda sums: _sum_over_ranks(sums, context))
        columns = {"advantages": advantages_T, "returns": returns_T}
        return Batch.from_columns(
            {
                **of_rows,
                **{name: _of_response(batch, Ragged(column.numpy(), sampled.offsets)) for name, column in columns.items()},
            }
        )


@dataclass(frozen=True)
class CorrectTokens:
    """Column `importance_weights` of all response tokens, and `loss_mask` with `loss_tokens` without those that are rejected,
    from `log_probs` and `rollout_log_probs`."""

    correction: ops.ImportanceCorrection
    is_normalized: bool = False
    """Weights are divided by their mean over the tokens of all ranks or, at level `sequence`, over their rows."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        import torch

        own = self.correction
        response = batch.tokens("response")
        sampled = sampled_tokens(batch, response)
        lengths_B = torch.tensor(sampled.lengths)
        given = _tensor(batch, "log_probs"), _tensor(batch, "rollout_log_probs"), lengths_B
        weights_T, _ = replace(own, rejections=()).weights(*given)
        if self.is_normalized:
            of_B = (lengths_B > 0).double() if own.level == "sequence" else lengths_B.double()
            total = (ops.row_means(weights_T.double(), lengths_B) * of_B).sum()
            total, count = _sum_over_ranks(torch.stack([total, of_B.sum()]), context)
            weights_T = weights_T / (total / count.clamp(min=1.0) if total > 1e-8 * count else 1.0)
        kept_T = own.kept(*given)
        context.report(ops.to_metrics({f"actor/{name}": metric for name, metric in own.weights(*given)[1].items()}))
        mask = _of_response(batch, Ragged(kept_T.numpy(), sampled.offsets))
        columns = {"importance_weights": _of_response(batch, Ragged(weights_T.float().numpy(), sampled.offsets))}
        return Batch.from_columns(
            {**columns, "loss_mask": mask, "loss_tokens": Ragged(kept_T.numpy(), sampled.offsets).where(kept_T.numpy()).lengths}
        )


def mean_kl(batch: Batch) -> float:
    """The KL to the reference per token of a step, in nats, from the column `kl` of its rows."""
    tokens = batch["loss_tokens" if "loss_tokens" in batch else "response_tokens"]
    return float(np.average(batch["kl"], weights=np.maximum(tokens, 1)))


@dataclass(frozen=True)
class RowKL:
    """Column `kl_sum`: the KL to the reference of each row, in nats, summed over the tokens that the policy sampled. Reports
    `kl/mean`, per token."""

    estimator: KLEstimator
    log_probs: str
    """Column with the policy's log-probabilities."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        import torch

        lengths_B = torch.tensor(sampled_tokens(batch, batch.tokens("response")).lengths)
        kl_T = ops.kl_estimate(_tensor(batch, self.log_probs), _tensor(batch, "reference_log_probs"), self.estimator)
        sums_B = (ops.row_means(kl_T, lengths_B) * lengths_B).numpy()
        context.report(Metrics({"kl/mean": Metric(float(sums_B.sum()), float(len(kl_T)))}))
        return Batch({"kl_sum": sums_B})


@dataclass(frozen=True)
class TeacherAdvantages:
    """Column `advantages`: the teacher's log-probability of each sampled token less the policy's, in nats. Reports
    `distillation/reverse_kl`, the mean of its negative."""

    log_probs: str
    """Column with the policy's log-probabilities."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        teacher, policy = (sampled_tokens(batch, batch.tokens(name)) for name in ("teacher_log_probs", self.log_probs))
        ahead = Ragged(teacher.values - policy.values, teacher.offsets)
        context.report(Metrics({"distillation/reverse_kl": Metric(-float(ahead.values.sum()), float(len(ahead.values)))}))
        return Batch.from_columns({"advantages": _of_response(batch, ahead)})


@dataclass(frozen=True)
class Filled:
    """Per-token columns of one value each, and with `has_mask` column `loss_mask`, of ones: for rows that are to stand beside
    others which have them. False where there is nothing to add."""

    values: Mapping[str, float]
    has_mask: bool = False

    def __bool__(self) -> bool:
        return bool(self.values) or self.has_mask

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        response = batch.tokens("response")
        columns = {
            name: Ragged(np.full(len(response.values), value, np.float32), response.offsets)
            for name, value in self.values.items()
        }
        if self.has_mask:
            columns["loss_mask"] = Ragged(np.ones(len(response.values), np.bool_), response.offsets)
        return Batch.from_columns(columns)


def _tensor(batch: Batch, name: str) -> torch.Tensor:
    import torch

    return torch.tensor(
        sampled_tokens(batch, batch.tokens(name)).values
    )  # a copy: shards are read-only, and torch has no read-only tensors


def _of_response(batch: Batch, sampled: Ragged) -> Ragged:
    """Numbers of sampled tokens in rows of all response tokens."""
    if "loss_mask" not in batch:
        return sampled
    mask = batch.tokens("loss_mask")
    return sampled.spread(mask.values.astype(np.bool_), mask.offsets)


def count_loss_tokens(batch: Batch, context: RankContext) -> Batch:
    """Column `loss_tokens` of a batch with `loss_mask`, for whoever wrote the mask and not the count."""
    mask = batch.tokens("loss_mask")
    return Batch({"loss_tokens": sampled_tokens(batch, mask).lengths})


def row_log_ratios(batch: Batch, context: RankContext) -> Batch:
    """Column `log_ratio`: of each row, the sum of `log_probs` less `reference_log_probs` over its sampled tokens, in nats."""
    log_probs, reference = (sampled_tokens(batch, batch.tokens(name)) for name in ("log_probs", "reference_log_probs"))
    cumulative = np.concatenate([[0.0], np.cumsum(log_probs.values.astype(np.float64) - reference.values)])
    return Batch({"log_ratio": np.diff(cumulative[log_probs.offsets]).astype(np.float32)})


@dataclass(frozen=True)
class PolicyAges:
    """Reports how old the sampled tokens of a batch with `policy_versions` are, in updates of the policy; writes no column."""

    version: int
    """Of the policy that learns from them."""

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        runs = batch.tokens("policy_versions").values.reshape(-1, 2)
        ages, tokens = self.version - runs[:, 0], runs[:, 1].astype(np.float64)
        if len(runs):
            counts = np.bincount(ages, weights=tokens)
            metrics = {"staleness/mean": Metric(float(ages @ tokens), float(tokens.sum()))}
            metrics["staleness/max"] = Metric(float(ages.max()), kind="max")
            shares = {f"staleness/share_of_age_{age}": Metric(float(n), float(tokens.sum())) for age, n in enumerate(counts)}
            context.report(Metrics(metrics | shares))
        return Batch({"age": np.zeros(len(batch), np.int64)})


def _sum_over_ranks(sums: torch.Tensor, context: RankContext) -> torch.Tensor:
    import torch.distributed as dist

    if context.group is None:
        return sums
    on_device = sums.to(context.device)  # NCCL reduces nothing on the CPU
    dist.all_reduce(on_device, group=context.group)
    return on_device.to(sums.device)


def answer_keys(batch: Batch, context: RankContext) -> Batch:
    """Column `answer_key`: a number for what each response answers, equal where the answers are."""
    from hybridflow.rewards.answers import answer_of  # imports sympy: half a second that the controller does not need

    digests = [
        hashlib.blake2b(answer_of(str(text)).encode(), digest_size=8).digest() for text in batch.objects("response_text")
    ]
    return Batch({"answer_key": np.array([int.from_bytes(digest, "little") >> 1 for digest in digests], np.int64)})


@dataclass(frozen=True)
class CopyObjects:
    """Copies columns of objects, so that a few rows can be fetched without the shards they stand in."""

    names: tuple[str, ...]

    def __call__(self, batch: Batch, context: RankContext) -> Batch:
        return Batch.from_columns({name: list(batch.objects(name)) for name in self.names})
