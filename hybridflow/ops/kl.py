"""Kullback-Leibler divergence between policies: per-token estimates, and what sets the weight of the penalty.

T tokens of all rows end to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from hybridflow.config.choices import KLEstimator as KLEstimator

__all__ = ["AdaptiveKL", "FixedKL", "KLController", "kl_controller", "kl_estimate"]

MAX_LOG_RATIO = 20.0
"""Beyond it the exponential of a difference of log-probabilities says no more than `far off` and would overflow float32."""
MOST_LOW_VAR_KL = 10.0
"""Of one token, as in verl: a token that is that far off says no more by being farther."""
PLAIN: Mapping[KLEstimator, KLEstimator] = {"k1+": "k1", "k3+": "k3", "low_var_kl+": "low_var_kl", "abs+": "abs"}
"""The estimator whose value a straight-through one has."""


def kl_estimate(log_probs_T: Tensor, reference_T: Tensor, kind: KLEstimator) -> Tensor:
    """Estimates of KL(policy || reference) in nats at tokens that the policy sampled: shape [T].

    J. Schulman, "Approximating KL divergence" (2020), with r = reference / policy. k1 = -log r is unbiased and may be
    negative; k2 = (log r)^2 / 2 is biased; k3 = r - 1 - log r is unbiased and never negative; low_var_kl is k3 bounded as verl
    does it, |log r| by 20 and the value by 10; abs = |log r|. Of these only k2 has a gradient whose mean is the gradient of the
    KL: `k3+` has the value of k3 and the gradient of k2, and so on.

    Example:
        >>> import torch
        >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), "k1")
        tensor([0.5000])
    """
    log_ratio_T = reference_T - log_probs_T
    match kind:
        case "k1+" | "k3+" | "low_var_kl+" | "abs+":
            through_T = 0.5 * log_ratio_T.square()
            return through_T - through_T.detach() + kl_estimate(log_probs_T, reference_T, PLAIN[kind]).detach()
        case "k1":
            return -log_ratio_T
        case "abs":
            return log_ratio_T.abs()
        case "k2":
            return 0.5 * log_ratio_T.square()
        case "k3":
            log_ratio_T = log_ratio_T.clamp(max=MAX_LOG_RATIO)
            return log_ratio_T.expm1() - log_ratio_T  # expm1, since r - 1 loses all digits where the policies agree
        case "low_var_kl":
            log_ratio_T = log_ratio_T.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            return (log_ratio_T.expm1() - log_ratio_T).clamp(max=MOST_LOW_VAR_KL)


class KLController(ABC):
    """Sets the weight of the KL penalty."""

    def __init__(self, coefficient: float):
        self.coefficient = coefficient

    @abstractmethod
    def update(self, observed_kl: float, num_rows: int) -> None:
        """Take note of the mean KL of a step with `num_rows` rows; later reads of `coefficient` may differ."""

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {}

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what `state_dict` gave. What a controller of another kind gave means nothing to this one."""


class FixedKL(KLController):
    """A weight that stays as configured."""

    def update(self, observed_kl: float, num_rows: int) -> None:
        pass

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        pass


class AdaptiveKL(KLController):
    """A weight steered towards a target KL by a proportional controller in log space.

    Ziegler et al. 2019, arXiv:1909.08593, sec. 2.2: coefficient *= 1 + K e with e = clip(KL / target - 1, -0.2, 0.2). The
    gain K is `num_rows / horizon`, so that steps of any size react alike per row.

    Example:
        >>> kl = AdaptiveKL(0.1, target=6.0, horizon=10000)
        >>> kl.update(observed_kl=12.0, num_rows=1000)  # twice the target, clipped to 0.2
        >>> round(kl.coefficient, 6)
        0.102
    """

    MAX_ERROR = 0.2

    def __init__(self, coefficient: float, target: float, horizon: float):
        super().__init__(coefficient)
        self.target = target
        self.horizon = horizon

    def update(self, observed_kl: float, num_rows: int) -> None:
        error = min(max(observed_kl / self.target - 1.0, -self.MAX_ERROR), self.MAX_ERROR)
        self.coefficient *= 1.0 + error * num_rows / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.coefficient = state.get("coefficient", self.coefficient)


def kl_controller(kind: Literal["fixed", "adaptive"], coefficient: float, *, target: float, horizon: float) -> KLController:
    """The controller that options of an algorithm describe."""
    return AdaptiveKL(coefficient, target, horizon) if kind == "adaptive" else FixedKL(coefficient)
