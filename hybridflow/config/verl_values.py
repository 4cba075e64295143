"""Conversions of the table in verl_keys.py: from one value of verl's to one of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hybridflow.config.build import UnfitError, convert
from hybridflow.errors import HybridflowError

Convert = Callable[[object], object]


class UntranslatableError(HybridflowError):
    """A value of verl's that means nothing here; the message says what to do."""


def choice(words: str, **names: object) -> Convert:
    """Names of verl's with the names here; `words` say what to do with others."""

    def converted(value: object) -> object:
        if str(value) not in names:
            raise UntranslatableError(f"found {value!r}; allowed: {', '.join(names)}. {words}")
        return names[str(value)]

    return converted


def _loggers(value: object) -> object:
    named = {"console": "console", "wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow", "file": "jsonl"}
    known = choice("Any other is a class of your own, as my_package.module:Class in trackers.names", **named)
    return [known(name) for name in as_list(value)]


def as_list(value: object) -> list[object]:
    """A list as it is, null as none, anything else as one element."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def as_type(hint: object, value: object) -> object:
    """`value`, which must be what a key of ours of this type takes.

    Raises:
        UntranslatableError: it is not.
    """
    try:
        return convert(value, hint)
    except UnfitError as error:
        raise UntranslatableError(str(error)) from error


def is_true(value: object) -> bool:
    """Whether a switch of verl's is on; null is off."""
    return value is not None and bool(as_type(bool, value))


def is_off(value: object) -> bool:
    """What switches off whatever verl has there. Zero is a number."""
    return value is None or value is False or value in ("", "null", "none", "None", [], {})


KL_NAMES = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "low_var_kl", "k3": "low_var_kl", "abs": "abs"}
STRAIGHT_THROUGH = {f"{name}+": ours if ours == "k2" else f"{ours}+" for name, ours in KL_NAMES.items()}
KL_ESTIMATOR = choice("The whole distribution is not at hand", **KL_NAMES, **STRAIGHT_THROUGH)
AGGREGATION = choice(
    "Set algorithm.loss_aggregation",
    **{
        "token-mean": "token_mean",
        "token-sum": "token_sum",
        "seq-mean-token-mean": "sequence_mean",
        "seq-mean-token-sum": "sequence_mean_of_sums",
        "seq-mean-token-sum-norm": "sequence_sum",
    },
)
TRUNCATION = choice("Set it to left or error, or data.filter_overlong_prompts to True", error="error", left="truncate_left")
CONVERSIONS: Mapping[str, Convert] = {
    "as_list": as_list,
    "minus_one_is_null": lambda value: None if value == -1 else value,
    "minus_one_is_zero": lambda value: 0 if value == -1 else value,
    "null_is_zero": lambda value: 0 if value is None else value,
    "or_zero": lambda value: 0.0 if value is None else value,
    # verl's first step is 1, and its actor learns in the step that has this number.
    "critic_warmup": lambda value: max(0, int(str(as_type(int, value))) - 1),
    "engine": choice("Set it to vllm, sglang or hf", vllm="vllm", sglang="sglang", hf="torch"),
    "device": choice("Models run on CUDA and on CPUs: set it to cuda or cpu", auto="auto", cuda="cuda", cpu="cpu"),
    "freed": lambda value: "auto" if is_true(value) else False,
    "loggers": _loggers,
}
