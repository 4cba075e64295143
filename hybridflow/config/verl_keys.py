"""verl's names of configuration keys, read from the table in verl_keys.txt, which says how."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

MODEL = "actor_rollout_ref.model"
ALIASES = {
    "reward.custom_reward_function": "custom_reward_function",
    "reward.reward_manager.name": "reward_model.reward_manager",
    "reward.reward_model.model_path": "reward_model.model.path",
    "reward.reward_model": "reward_model",
    "reward.reward_kwargs": "reward_model.reward_kwargs",
    "reward.sandbox_fusion": "reward_model.sandbox_fusion",
    "reward.num_workers": "reward_model.num_workers",
    "sandbox_fusion": "reward_model.sandbox_fusion",
    "reward_model.reward_loop_source": "reward.reward_loop_source",
    "reward_model.reward_loop_module_path": "reward.reward_loop_module_name",
    "reward_model.reward_loop_class_name": "reward.reward_loop_class_name",
    "reward_model.overlong_buffer": "reward_model.reward_kwargs.overlong_buffer_cfg",
    "reward_manager.name": "reward_model.reward_manager",
    "reward_manager": "reward.reward_manager",
    "algorithm.dynamic_filter": "algorithm.filter_groups",
    "critic.fsdp_config": "critic.model.fsdp_config",
    "critic.fsdp": "critic.model.fsdp_config",
    "actor_rollout_ref.actor.fsdp": "actor_rollout_ref.actor.fsdp_config",
    "actor_rollout_ref.ref.fsdp": "actor_rollout_ref.ref.fsdp_config",
    "ray_init": "ray_kwargs.ray_init",
    "trainer.val_generations_to_log_to_wandb": "trainer.log_val_generations",
    "trainer.max_ckpt_to_keep": "trainer.max_actor_ckpt_to_keep",
    "trainer.seed": "data.seed",
    "actor_rollout_ref.actor.policy_loss.rollout_correction": "algorithm.rollout_correction",
    "hydra/job_logging": "hydra.job_logging",
    "hydra/hydra_logging": "hydra.hydra_logging",
} | {
    f"{part}.lora.{name}": f"{model}.{ours}"
    for part, model in (("actor_rollout_ref.actor", MODEL), (MODEL, MODEL))
    for name, ours in {
        "rank": "lora_rank",
        "alpha": "lora_alpha",
        "target_modules": "target_modules",
        "exclude_modules": "exclude_modules",
        "adapter_path": "lora_adapter_path",
    }.items()
}
ALIASES |= {"critic.model.lora.rank": "critic.model.lora_rank"}
ALIASES |= {  # of the first scripts for Clip-Cov and KL-Cov
    f"actor_rollout_ref.actor.{name}": f"actor_rollout_ref.actor.policy_loss.{name}"
    for name in ("loss_mode", "clip_cov_ratio", "clip_cov_lb", "clip_cov_ub", "kl_cov_ratio", "ppo_kl_coef")
}
ALIASES |= {
    f"reward_model.{name}": f"reward.{name}"
    for name in ("max_concurrent", "max_rpm", "max_tpm", "estimated_tokens_per_request")
}
ALIASES |= {f"{part}.optim.lr_scheduler_type": f"{part}.optim.warmup_style" for part in ("actor_rollout_ref.actor", "critic")}
"""Other names of keys and sections, of older and newer releases of verl and in documents about it."""

SHORT_FORMS = ("actor_rollout_ref.", "data.", "trainer.")
"""Documents about verl often leave these out: `actor.optim.lr`, `train_batch_size`."""
NEVER_SHORT = ("trainer.checkpoint", "actor_rollout_ref.rollout.server", "actor_rollout_ref.rollout.custom")
"""Sections that are verl's by their full names alone: the short ones would take slips in keys of ours."""

SECTIONS = frozenset({"actor_rollout_ref", "trainer", "custom_reward_function", "reward_manager", "ray_init", "ray_kwargs"})
SECTIONS |= {"global_profiler", "transfer_queue", "hydra", "npu_profile", "distillation", "async_training"}
SECTIONS |= {"model_engine", "skip", "sandbox_fusion"}
"""Top-level sections that only verl has."""
SHARED = ("critic.model.", "critic.optim.", "critic.fsdp", "reward_model.model.", "reward_model.reward_kwargs.")
"""Sections of verl's within sections that are ours too."""
PART_OF = {"actor_rollout_ref.actor": "actor", "critic": "critic"}


@dataclass(frozen=True)
class Key:
    """A line of the table."""

    name: str
    default: object
    """verl's."""
    is_filled: bool
    """Whether verl's default is taken over where the key is left out."""
    how: str
    """`=`, a conversion, `@rule`, `-` or `only`."""
    ours: str
    """What it sets, as a list with commas; for `only`, the values that pass beside the default."""
    words: str
    since: str = "0.1"
    """Our release that takes it."""

    @property
    def is_section(self) -> bool:
        """Whether keys below it are taken with it."""
        return self.how in ("-", "only") or self.ours in FREE


FREE = frozenset({"reward.options", "rollout.engine_options", "data.chat_template_options"})
"""Keys of ours that are mappings with entries of any name."""


def full_name(key: str) -> str:
    """`key` as the table has it, where a document left out its beginning or calls it otherwise."""
    for prefix in ("", *SHORT_FORMS):
        name = prefix + key
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            if other := ALIASES.get(".".join(parts[:length])):
                name = ".".join([other, *parts[length:]])
                break
        is_too_short = prefix and (name.partition(".")[0] == key or name.startswith(NEVER_SHORT))
        if (name in KEYS or _section_of(name)) and not is_too_short:
            return name
    return key


def find(key: str) -> Key | None:
    """The line for `key`, a full name: its own, or that of a section around it; None where the table has none."""
    return KEYS.get(key) or _section_of(key)


def is_verls(key: str) -> bool:
    """Whether `key`, a full name, is one of verl's, known or not."""
    return find(key) is not None or key.partition(".")[0] in SECTIONS or key.startswith(SHARED)


def suggestion(key: str) -> str:
    """`Did you mean 'x'? ` for an unknown key of verl's."""
    near = difflib.get_close_matches(key, KEYS, 1, 0.85)
    return f"Did you mean {near[0]!r}? " if near else ""


def misspelt(key: str) -> str:
    """`Did you mean 'x'? ` for a key that is nearly one beside it in the same section of verl's."""
    section, _, last = key.rpartition(".")
    beside = [name.rpartition(".")[2] for name in KEYS if name.rpartition(".")[0] == section]
    near = difflib.get_close_matches(last, beside, 1, 0.85)
    return f"Did you mean {f'{section}.{near[0]}'!r}? " if near else ""


def stands_for() -> dict[str, str]:
    """Each key of verl's with the one of ours that takes its value; empty where it is none, or more."""
    return {key.name: key.ours if key.how == "=" else "" for key in KEYS.values()}


def _section_of(key: str) -> Key | None:
    parts = key.split(".")
    if parts[-1] == "_target_":
        return KEYS["_target_"]
    around = (KEYS.get(".".join(parts[:length])) for length in range(len(parts) - 1, 0, -1))
    return next((found for found in around if found is not None and found.is_section), None)


def _expanded(text: str) -> Iterator[str]:
    """Every reading of `a.{b,c}`."""
    if match := re.search(r"\{([^{}]*,[^{}]*|[a-z_.]+)\}", text):
        for choice in match[1].split(","):
            yield from _expanded(text[: match.start()] + choice + text[match.end() :])
    else:
        yield text


def _read(table: str) -> Iterator[Key]:
    sections = [""]
    for line in table.splitlines():
        if line.startswith("["):
            sections = list(_expanded(line[1:-1]))
        elif line and not line.startswith("#"):
            keys, default, how, words = (part.strip() for part in f"{line} ".split(" | "))
            way, _, ours = how.partition(" ")
            for section in sections:
                for name in _expanded(keys):
                    here, verl = PART_OF.get(section, ""), default.removeprefix("(").removesuffix(")")
                    yield Key(
                        name=f"{section}.{name}" if section else name,
                        default=yaml.safe_load(re.sub(r"^(\d)e", r"\1.0e", verl)),
                        is_filled=verl == default,
                        how=way,
                        ours=ours.replace("{}", here),
                        words=words.replace("{}", here),
                    )


TABLE = Path(__file__).with_name("verl_keys.txt")
KEYS: Mapping[str, Key] = {key.name: key for key in _read(TABLE.read_text(encoding="utf-8"))}
