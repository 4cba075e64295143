"""Which metrics are an algorithm's own: those that no part of the framework writes in every run. Trackers show them by name."""

from __future__ import annotations

from collections.abc import Iterable

PREFIXES = frozenset(
    {"reward", "prompt", "response", "kl", "mismatch", "staleness", "stream", "importance", "seconds", "memory", "sync"}
    | {"controller", "validation", "tokens_per_second", "episode", "step", "time"}
)
"""What stands before the slash in the framework's names; all names with one of them are the framework's."""
OF_SOME = frozenset(
    {"loss", "clip_fraction", "grad_norm", "learning_rate", "tokens", "skipped_updates", "mfu", "policy_loss", "entropy"}
    | {"negative_log_prob", "approx_kl", "kl_to_reference", "clip_fraction_upper", "clip_fraction_lower", "ratio_max"}
    | {"dual_clip_fraction", "correction_weight", "correction_capped", "correction_masked", "explained_variance", "values"}
    | {"returns", "returns_sq", "value_error", "value_error_sq", "turns", "histories"}
)
"""The framework's names after `actor/`, `critic/` and `environment/`."""


def own_metrics(names: Iterable[str]) -> list[str]:
    """Of `names` those of the algorithm, of its loss, its roles and its environment, in their order.

    Example:
        >>> own_metrics(["actor/loss", "actor/margin", "environment/turns", "environment/solved"])
        ['actor/margin', 'environment/solved']
    """
    return [name for name in names if not _is_frameworks(name)]


def _is_frameworks(name: str) -> bool:
    prefix, _, rest = name.partition("/")
    return prefix in PREFIXES or (prefix in ("actor", "critic", "environment") and rest in OF_SOME)
