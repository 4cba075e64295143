"""Tensor mathematics of the algorithms, each formula once. Ragged rows lie end to end; nothing is padded.

Importing this package does not import torch; touching one of its names does. Algorithm files can therefore name
`ops.PolicyLoss` and still be checked by a configuration that never gets as far as training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hybridflow.ops.advantages import *  # noqa: F403
    from hybridflow.ops.correction import *  # noqa: F403
    from hybridflow.ops.kl import *  # noqa: F403
    from hybridflow.ops.log_probs import *  # noqa: F403
    from hybridflow.ops.losses import *  # noqa: F403
    from hybridflow.ops.preferences import *  # noqa: F403
    from hybridflow.ops.reduce import *  # noqa: F403
    from hybridflow.ops.surrogates import *  # noqa: F403

_NAMES = {
    "advantages": (
        *("best_of_group", "drawn_by_reward", "gae", "group_normalized", "is_varied", "kl_in_reward", "leave_one_out"),
        *("length_weighted", "overlong_penalty", "rescaled", "token_rewards", "whiten"),
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


if not TYPE_CHECKING:  # of which a checker would take every name to be there

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
