"""Losses over pairs of rows, the chosen one before the rejected one: reward models, and policies that learn from preferences.

P pairs, B = 2 P rows, T response tokens of all rows of the microbatch end to end. A pair is never divided over microbatches:
its rows have the same number in column `pair`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hybridflow.ops.losses import Loss, TokenBatch
from hybridflow.ops.reduce import Aggregation, TokenMetric, row_sums

__all__ = ["PreferenceLoss", "RewardModelLoss"]

PreferenceKind = Literal["sigmoid", "ipo", "kto"]


@dataclass(frozen=True, kw_only=True)
class RewardModelLoss(Loss):
    """-log sigmoid(r_chosen - r_rejected - margin) of a model that reads one number r per row (Bradley and Terry).

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; with a margin, Touvron et al. 2023, arXiv:2307.09288, eq. 2; centred by
    (r_chosen + r_rejected)^2, Eisenstein et al. 2023, arXiv:2312.09244, eq. 8.
    """

    centring_coefficient: float = 0.0
    """Weight of the square of a pair's sum, which the difference leaves open."""
    has_margin: bool = False
    """Whether the batch has a column `margin`."""
    aggregation: Aggregation = "token_mean"
    """Of rows, each of which is read once."""
    max_tokens: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("margin",) if self.has_margin else ()

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        assert batch.values_T is not None, "a reward model's loss needs its scores"
        chosen_P, rejected_P = _pairs(batch.values_T)
        difference_P = chosen_P - rejected_P
        margin_P = batch.columns["margin"][0::2] if self.has_margin else 0.0
        loss_P = -logsigmoid(difference_P - margin_P)
        loss_P = loss_P + self.centring_coefficient * (chosen_P + rejected_P).square()
        weights_P = _pair_weights(batch)
        return (loss_P * weights_P).sum(), {
            "loss": TokenMetric.mean(loss_P, weights_P),
            "accuracy": TokenMetric.mean((difference_P > 0).float(), weights_P),
            "margin": TokenMetric.mean(difference_P, weights_P),
            "chosen": TokenMetric.mean(chosen_P, weights_P),
            "rejected": TokenMetric.mean(rejected_P, weights_P),
        }


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Loss):
    """Losses of a policy whose implicit reward of a response is beta log(policy / reference).

    `sigmoid` is DPO, Rafailov et al. 2023, arXiv:2305.18290, eq. 7, with labels smoothed as in its follow-up (cDPO); `ipo` is
    Azar et al. 2023, arXiv:2310.12036, eq. 17; `kto` is Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8, every chosen response
    desirable and every rejected one not, with the reference point in column `kl_baseline`.
    """

    kind: PreferenceKind = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round; of `sigmoid` only."""
    aggregation: Aggregation = "sequence_mean"
    max_tokens: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ("reference_log_probs", *(("kl_baseline",) if self.kind == "kto" else ()))

    def __call__(self, batch: TokenBatch) -> tuple[Tensor, dict[str, TokenMetric]]:
        assert batch.log_probs_T is not None, "a preference loss needs log-probabilities"
        log_ratio_T = batch.log_probs_T - batch.columns["reference_log_probs"]
        chosen_P, rejected_P = _pairs(row_sums(log_ratio_T, batch.lengths_B))
        loss_P = self._loss(chosen_P, rejected_P, batch)
        weights_P = _pair_weights(batch)
        with torch.no_grad():
            margin_P = self.beta * (chosen_P - rejected_P)
            metrics = {
                "loss": TokenMetric.mean(loss_P, weights_P),
                "accuracy": TokenMetric.mean((margin_P > 0).float(), weights_P),
                "margin": TokenMetric.mean(margin_P, weights_P),
                "chosen_reward": TokenMetric.mean(self.beta * chosen_P, weights_P),
                "rejected_reward": TokenMetric.mean(self.beta * rejected_P, weights_P),
            }
        return (loss_P * weights_P).sum(), metrics

    def _loss(self, chosen_P: Tensor, rejected_P: Tensor, batch: TokenBatch) -> Tensor:
        """The loss of each pair, shape [P]."""
        difference_P = self.beta * (chosen_P - rejected_P)
        match self.kind:
            case "sigmoid":
                smooth = self.label_smoothing
                return -(1 - smooth) * logsigmoid(difference_P) - smooth * logsigmoid(-difference_P)
            case "ipo":
                return (chosen_P - rejected_P - 1 / (2 * self.beta)).square()
            case "kto":
                baseline = batch.columns["kl_baseline"][0]
                desirable_P = 1 - torch.sigmoid(self.beta * (chosen_P - baseline))
                return 0.5 * (desirable_P + 1 - torch.sigmoid(self.beta * (baseline - rejected_P)))


def _pairs(rows_B: Tensor) -> tuple[Tensor, Tensor]:
    """Those of chosen and those of rejected rows."""
    assert len(rows_B) % 2 == 0, "rows of a pair follow each other, and never come alone"
    return rows_B[0::2], rows_B[1::2]


def _pair_weights(batch: TokenBatch) -> Tensor:
    """What each pair counts, shape [P]: the tokens' weights of both of its rows, 1 over all pairs of the update."""
    chosen_P, rejected_P = _pairs(row_sums(batch.weights_T, batch.lengths_B))
    return chosen_P + rejected_P
