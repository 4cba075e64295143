"""Tensor mathematics of the algorithms, each formula once. Ragged rows lie end to end; nothing is padded.

Importing this package does not import torch; touching one of its names does. Algorithm files can therefore name
`ops.PolicyLoss` and still be checked by a configuration that never gets as far as training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridflow.ops.advantages import best_of_group as best_of_group
    from hybridflow.ops.advantages import gae as gae
    from hybridflow.ops.advantages import group_normalized as group_normalized
    from hybridflow.ops.advantages import is_varied as is_varied
    from hybridflow.ops.advantages import kl_in_reward as kl_in_reward
    from hybridflow.ops.advantages import leave_one_out as leave_one_out
    from hybridflow.ops.advantages import length_weighted as length_weighted
    from hybridflow.ops.advantages import overlong_penalty as overlong_penalty
    from hybridflow.ops.advantages import rescaled as rescaled
    from hybridflow.ops.advantages import token_rewards as token_rewards
    from hybridflow.ops.advantages import whiten as whiten
    from hybridflow.ops.correction import ImportanceCorrection as ImportanceCorrection
    from hybridflow.ops.correction import importance_correction as importance_correction
    from hybridflow.ops.kl import AdaptiveKL as AdaptiveKL
    from hybridflow.ops.kl import FixedKL as FixedKL
    from hybridflow.ops.kl import KLController as KLController
    from hybridflow.ops.kl import kl_controller as kl_controller
    from hybridflow.ops.kl import kl_estimate as kl_estimate
    from hybridflow.ops.log_probs import LinearLogProbs as LinearLogProbs
    from hybridflow.ops.log_probs import linear_log_probs as linear_log_probs
    from hybridflow.ops.losses import Loss as Loss
    from hybridflow.ops.losses import NextTokenLoss as NextTokenLoss
    from hybridflow.ops.losses import PolicyLoss as PolicyLoss
    from hybridflow.ops.losses import PretrainingLoss as PretrainingLoss
    from hybridflow.ops.losses import TokenBatch as TokenBatch
    from hybridflow.ops.losses import ValueLoss as ValueLoss
    from hybridflow.ops.losses import explained_variance as explained_variance
    from hybridflow.ops.preferences import PreferenceLoss as PreferenceLoss
    from hybridflow.ops.preferences import RewardModelLoss as RewardModelLoss
    from hybridflow.ops.reduce import Aggregation as Aggregation
    from hybridflow.ops.reduce import Counts as Counts
    from hybridflow.ops.reduce import TokenMetric as TokenMetric
    from hybridflow.ops.reduce import accumulate as accumulate
    from hybridflow.ops.reduce import row_means as row_means
    from hybridflow.ops.reduce import row_sums as row_sums
    from hybridflow.ops.reduce import to_metrics as to_metrics
    from hybridflow.ops.reduce import token_weights as token_weights
    from hybridflow.ops.surrogates import PolicyTokens as PolicyTokens
    from hybridflow.ops.surrogates import Surrogate as Surrogate
    from hybridflow.ops.surrogates import clip_covariance as clip_covariance
    from hybridflow.ops.surrogates import clipped as clipped
    from hybridflow.ops.surrogates import clipped_weight as clipped_weight
    from hybridflow.ops.surrogates import geometric_mean as geometric_mean
    from hybridflow.ops.surrogates import kl_covariance as kl_covariance
    from hybridflow.ops.surrogates import policy_gradient as policy_gradient
    from hybridflow.ops.surrogates import quadratic as quadratic
    from hybridflow.ops.surrogates import sequence_ratio as sequence_ratio
    from hybridflow.ops.surrogates import soft_gate as soft_gate
    from hybridflow.ops.surrogates import token_ratio as token_ratio
    from hybridflow.ops.surrogates import within_divergence as within_divergence

_NAMES = {
    "advantages": (
        *("best_of_group", "gae", "group_normalized", "is_varied", "kl_in_reward", "leave_one_out", "length_weighted"),
        *("overlong_penalty", "rescaled", "token_rewards", "whiten"),
    ),
    "correction": ("ImportanceCorrection", "importance_correction"),
    "kl": ("AdaptiveKL", "FixedKL", "KLController", "kl_controller", "kl_estimate"),
    "log_probs": ("LinearLogProbs", "linear_log_probs"),
    "losses": ("Loss", "NextTokenLoss", "PolicyLoss", "PretrainingLoss", "TokenBatch", "ValueLoss", "explained_variance"),
    "preferences": ("PreferenceLoss", "RewardModelLoss"),
    "reduce": ("Aggregation", "Counts", "TokenMetric", "accumulate", "row_means", "row_sums", "to_metrics", "token_weights"),
    "surrogates": (
        *("PolicyTokens", "Surrogate", "clip_covariance", "clipped", "clipped_weight", "geometric_mean"),
        *("kl_covariance", "policy_gradient", "quadratic", "sequence_ratio", "soft_gate", "token_ratio", "within_divergence"),
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
