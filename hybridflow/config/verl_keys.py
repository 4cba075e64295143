"""verl's key names, so that a script written for verl runs as it stands: one table from each to ours.

A key that is not in the table and begins like one of verl's is a mistake that says so.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hybridflow.config import verl_values as values
from hybridflow.config.verl_values import (
    Apply,
    Convert,
    Given,
    UntranslatableError,
    choice,
    count_or_zero,
    rows_to_tokens,
    shared,
)


@dataclass(frozen=True)
class Translation:
    """What a key of verl's becomes."""

    becomes: str
    """In words, for the documentation."""
    apply: Apply
    warning: str = ""
    """What a user is told who gives the key."""


def to(*targets: str, by: Convert | None = None) -> Translation:
    """The same value, or `by` of it, under other names."""
    return Translation(
        ", ".join(f"`{target}`" for target in targets),
        lambda value, given: dict.fromkeys(targets, by(value) if by else value),
    )


def by(becomes: str, apply: Apply) -> Translation:
    """What `apply` says; `becomes` names the keys it sets."""
    return Translation(becomes, apply)


def through(target: str, make: Callable[[str], Apply]) -> Translation:
    """One key of ours, set by what `make` gives for it."""
    return Translation(f"`{target}`", make(target))


def always(allowed: object, reason: str) -> Translation:
    """A choice that verl offers and that is made here: one value is accepted, others are a mistake with the reason."""
    accepted = allowed if isinstance(allowed, tuple) else (allowed,)

    def apply(value: object, given: Given) -> Mapping[str, object]:
        if value not in accepted:
            raise UntranslatableError(f"found {value!r}; only {' or '.join(map(repr, accepted))} is possible: {reason}")
        return {}

    return Translation(f"always {accepted[0]}: {reason}", apply)


def nothing(advice: str) -> Translation:
    """A key without equivalent; `advice` says what to do. null is accepted."""

    def apply(value: object, given: Given) -> Mapping[str, object]:
        if value is not None:
            raise UntranslatableError(f"verl's key has no equivalent here: {advice}")
        return {}

    return Translation(f"no equivalent: {advice}", apply)


def ignored(reason: str) -> Translation:
    """A key that changes nothing here: accepted, with a warning."""
    return Translation(f"nothing: {reason}", lambda value, given: {}, warning=f"verl's key changes nothing here: {reason}")


ACTOR, ROLLOUT, REF, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref", "model"))
TRAINED = {ACTOR: "actor", "critic": "critic"}
FSDP = {f"{ACTOR}.fsdp_config": "actor", "critic.model.fsdp_config": "critic", "critic.fsdp": "critic"}
FSDP |= {f"{REF}.fsdp_config": "reference"}
DYNAMIC = [f"{place}use_dynamic_bsz" for place in (f"{ACTOR}.", "critic.", f"{ROLLOUT}.log_prob_", f"{REF}.log_prob_")]
BY_TOKENS_OF = "microbatches are cut by tokens, see {}.tokens_per_microbatch"
SHARED_RANKS = through("model.sequence_parallel", shared)
SHARED_TRUST = through("model.trust_remote_code", shared)


def _of_trained(ours: str) -> dict[str, Translation]:
    """What actor and critic both have, by the last words of the key."""
    return {
        "optim.lr": to(f"{ours}.learning_rate"),
        "optim.lr_warmup_steps": to(f"{ours}.warmup_steps", by=count_or_zero),
        "optim.lr_warmup_steps_ratio": always((0, 0.0), f"set {ours}.warmup_steps"),
        "optim.warmup_style": to(f"{ours}.schedule"),
        "optim.lr_scheduler_type": to(f"{ours}.schedule"),
        "optim.weight_decay": to(f"{ours}.weight_decay"),
        "grad_clip": to(f"{ours}.max_grad_norm"),
        "ppo_micro_batch_size": nothing(f"set {ours}.tokens_per_microbatch"),
        "ppo_micro_batch_size_per_gpu": through(f"{ours}.tokens_per_microbatch", rows_to_tokens),
        "ppo_max_token_len_per_gpu": to(f"{ours}.tokens_per_microbatch"),
    }


KEYS: Mapping[str, Translation] = {
    # several roles
    **{f"{verl}.{key}": to_ours for verl, ours in TRAINED.items() for key, to_ours in _of_trained(ours).items()},
    **{f"{verl}.optimizer_offload": to(f"{ours}.offload_optimizer") for verl, ours in FSDP.items() if ours != "reference"},
    **{f"{verl}.param_offload": to(f"{ours}.offload_parameters") for verl, ours in FSDP.items()},
    **{f"{verl}.strategy": always(("fsdp", "fsdp2"), "training runs on FSDP2") for verl in (ACTOR, REF, "critic")},
    **{f"{verl}.ulysses_sequence_parallel_size": SHARED_RANKS for verl in (ACTOR, REF, "critic")},
    **{f"{verl}.trust_remote_code": SHARED_TRUST for verl in ("data", MODEL, "critic.model")},
    **{f"{verl}.use_remove_padding": always(True, "rows are packed without padding") for verl in (MODEL, "critic.model")},
    **{key: always(True, "microbatches are cut by tokens (tokens_per_microbatch)") for key in DYNAMIC},
    **{f"{ROLLOUT}.log_prob_micro_batch_size{end}": ignored(BY_TOKENS_OF.format("actor")) for end in ("", "_per_gpu")},
    # algorithm
    "algorithm.adv_estimator": to("algorithm.name", by=choice(gae="ppo", grpo="grpo")),
    "algorithm.lam": to("algorithm.gae_lambda"),
    "algorithm.use_kl_in_reward": by("`algorithm.kl_in`", values.kl_in_reward),
    "algorithm.kl_penalty": by("`algorithm.kl_estimator`", values.kl_penalty),
    "algorithm.kl_ctrl.type": to("algorithm.kl_controller"),
    "algorithm.kl_ctrl.kl_coef": to("algorithm.kl_coefficient"),
    "algorithm.kl_ctrl.target_kl": to("algorithm.kl_target"),
    "algorithm.kl_ctrl.horizon": to("algorithm.kl_horizon"),
    "algorithm.norm_adv_by_std_in_grpo": to("algorithm.scale_by_std"),
    # data
    "data.val_files": to("data.validation_files", by=lambda value: [] if value is None else value),
    "data.train_batch_size": to("data.prompts_per_step"),
    "data.val_batch_size": ignored("all validation prompts go to the engine at once"),
    "data.max_prompt_length": to("data.max_prompt_tokens"),
    "data.max_response_length": to("data.max_response_tokens"),
    "data.filter_overlong_prompts": by("`data.overlong_prompts`", values.overlong_prompts),
    "data.filter_overlong_prompts_workers": ignored("filtering needs no processes of its own"),
    "data.truncation": by("`data.overlong_prompts`", values.truncation),
    "data.seed": to("run.seed"),
    "data.tokenizer": to("model.tokenizer"),
    "data.val_max_samples": to("validation.max_prompts", by=lambda value: None if value == -1 else value),
    "data.prompt_key": always("prompt", "the column of prompts is called so; rename yours when preparing the data"),
    "data.reward_fn_key": always("data_source", "the column that names the source is called so"),
    "data.return_raw_chat": ignored("prompts are lists of messages or strings"),
    "data.image_key": nothing("prompts are text; leave it out"),
    # model
    f"{MODEL}.path": to("model.path"),
    f"{MODEL}.tokenizer_path": to("model.tokenizer"),
    f"{MODEL}.use_shm": always(False, "models load from where they are"),
    f"{MODEL}.enable_gradient_checkpointing": to("model.gradient_checkpointing"),
    f"{MODEL}.lora_rank": to("model.lora_rank"),
    f"{MODEL}.lora_alpha": to("model.lora_alpha"),
    f"{MODEL}.target_modules": to("model.lora_targets"),
    f"{MODEL}.external_lib": nothing("name your classes as my_package.module:Class where a key takes one"),
    # actor
    f"{ACTOR}.optim.min_lr_ratio": to("actor.min_learning_rate_ratio"),
    f"{ACTOR}.optim.betas": to("actor.adam_betas"),
    f"{ACTOR}.ppo_mini_batch_size": to("algorithm.prompts_per_update"),
    f"{ACTOR}.ppo_epochs": to("algorithm.epochs"),
    f"{ACTOR}.shuffle": nothing("rows are drawn in random order in every epoch"),
    f"{ACTOR}.clip_ratio": to("algorithm.clip", by=lambda value: [value, value]),
    f"{ACTOR}.clip_ratio_low": by("`algorithm.clip`", values.clip(0)),
    f"{ACTOR}.clip_ratio_high": by("`algorithm.clip`", values.clip(1)),
    f"{ACTOR}.clip_ratio_c": to("algorithm.dual_clip"),
    f"{ACTOR}.entropy_coeff": to("algorithm.entropy_coefficient"),
    f"{ACTOR}.use_kl_loss": by("`algorithm.kl_in`, `algorithm.kl_estimator`", values.kl_in_loss),
    f"{ACTOR}.kl_loss_coef": by("`algorithm.kl_coefficient`", values.kl_loss_coefficient),
    f"{ACTOR}.kl_loss_type": by("`algorithm.kl_estimator`", values.kl_loss_type),
    f"{ACTOR}.loss_agg_mode": to(
        "algorithm.loss_aggregation",
        by=choice(
            **{
                "token-mean": "token_mean",
                "seq-mean-token-mean": "sequence_mean",
                "seq-mean-token-sum-norm": "sequence_sum",
                "seq-mean-token-sum": None,
            }
        ),
    ),
    f"{ACTOR}.use_torch_compile": to("model.compile"),
    f"{ACTOR}.lora.rank": to("model.lora_rank"),
    f"{ACTOR}.lora.alpha": to("model.lora_alpha"),
    f"{ACTOR}.lora.target_modules": to("model.lora_targets"),
    f"{ACTOR}.fsdp_config.fsdp_size": always(-1, "weights are sharded over all ranks of the role"),
    # rollout
    f"{ROLLOUT}.name": to("rollout.engine", by=choice(vllm="vllm", sglang="sglang", hf="torch")),
    f"{ROLLOUT}.mode": always(("sync", "async"), "the engine takes requests while it runs"),
    f"{ROLLOUT}.n": to("algorithm.responses_per_prompt"),
    f"{ROLLOUT}.temperature": to("rollout.temperature"),
    f"{ROLLOUT}.top_p": to("rollout.top_p"),
    f"{ROLLOUT}.top_k": to("rollout.top_k", by=count_or_zero),
    f"{ROLLOUT}.ignore_eos": to("rollout.ignore_eos"),
    f"{ROLLOUT}.dtype": to("rollout.dtype"),
    f"{ROLLOUT}.tensor_model_parallel_size": to("rollout.tensor_parallel"),
    f"{ROLLOUT}.gpu_memory_utilization": to("rollout.gpu_memory_utilization"),
    f"{ROLLOUT}.max_num_seqs": to("rollout.max_num_seqs"),
    f"{ROLLOUT}.max_num_batched_tokens": to("rollout.engine_options.max_num_batched_tokens"),
    f"{ROLLOUT}.max_model_len": nothing("it is data.max_prompt_tokens + data.max_response_tokens"),
    f"{ROLLOUT}.prompt_length": to("data.max_prompt_tokens"),
    f"{ROLLOUT}.response_length": to("data.max_response_tokens"),
    f"{ROLLOUT}.enforce_eager": to("rollout.enforce_eager"),
    f"{ROLLOUT}.enable_chunked_prefill": to("rollout.engine_options.enable_chunked_prefill"),
    f"{ROLLOUT}.free_cache_engine": by("`rollout.sleep`", values.cache_is_freed),
    f"{ROLLOUT}.load_format": ignored("the engine gets its weights from the trainer"),
    f"{ROLLOUT}.calculate_log_probs": nothing("set algorithm.old_log_probs: rollout to use the engine's"),
    f"{ROLLOUT}.log_prob_max_token_len_per_gpu": by(
        "`actor.tokens_per_microbatch`, where nothing else sets it", values.unless_given("actor.tokens_per_microbatch")
    ),
    f"{ROLLOUT}.val_kwargs.temperature": to("validation.temperature"),
    f"{ROLLOUT}.val_kwargs.top_p": to("validation.top_p"),
    f"{ROLLOUT}.val_kwargs.top_k": to("validation.top_k", by=count_or_zero),
    f"{ROLLOUT}.val_kwargs.n": to("validation.responses_per_prompt"),
    f"{ROLLOUT}.val_kwargs.do_sample": by("`validation.temperature`: 0 where False", values.sampling),
    # reference
    f"{REF}.log_prob_max_token_len_per_gpu": to("reference.tokens_per_microbatch"),
    f"{REF}.log_prob_micro_batch_size": ignored(BY_TOKENS_OF.format("reference")),
    f"{REF}.log_prob_micro_batch_size_per_gpu": through("reference.tokens_per_microbatch", rows_to_tokens),
    # critic
    "critic.model.path": to("critic.path"),
    "critic.model.tokenizer_path": nothing("all models share model.tokenizer"),
    "critic.model.enable_gradient_checkpointing": through("model.gradient_checkpointing", shared),
    "critic.cliprange_value": to("algorithm.value_clip"),
    "critic.ppo_epochs": through("algorithm.epochs", shared),
    "critic.ppo_mini_batch_size": through("algorithm.prompts_per_update", shared),
    # reward
    "reward_model.enable": always(False, "rewards come from rules and functions; a reward model is a role of your own"),
    "reward_model.reward_manager": always("naive", "each response is scored on its own; name a function with reward.name"),
    "reward_model.num_workers": to("reward.num_processes"),
    "custom_reward_function.path": to("reward.path"),
    "custom_reward_function.name": to("reward.function"),
    # trainer
    "trainer.balance_batch": always(True, "rows go to ranks balanced by tokens"),
    "trainer.critic_warmup": by("`algorithm.critic_warmup_steps`", values.critic_warmup),
    "trainer.logger": to("trackers.names"),
    "trainer.project_name": to("trackers.project"),
    "trainer.experiment_name": by("`trackers.run_name`, and `run.folder` as outputs/NAME where it is not set", values.run_name),
    "trainer.default_local_dir": to("run.folder"),
    "trainer.default_hdfs_dir": nothing("checkpoints are written to run.folder; mount or copy it"),
    "trainer.n_gpus_per_node": by("`placement.pools.main`: NODESxRANKS", values.pool_size("ranks_per_node")),
    "trainer.nnodes": by("`placement.pools.main`: NODESxRANKS", values.pool_size("nodes")),
    "trainer.total_epochs": to("run.total_epochs"),
    "trainer.total_training_steps": to("run.total_steps"),
    "trainer.save_freq": to("checkpoint.every_steps", by=count_or_zero),
    "trainer.test_freq": to("validation.every_steps", by=count_or_zero),
    "trainer.val_before_train": to("validation.before_training"),
    "trainer.val_only": always(False, "validation happens before training (validation.before_training) and during it"),
    "trainer.log_val_generations": to("validation.num_samples_logged"),
    "trainer.max_actor_ckpt_to_keep": to("checkpoint.keep", by=lambda value: 0 if value is None else value),
    "trainer.max_critic_ckpt_to_keep": nothing("actor and critic are in one checkpoint: checkpoint.keep"),
    "trainer.resume_mode": by("`checkpoint.resume`", values.resume_mode),
    "trainer.resume_from_path": by("`checkpoint.resume`", values.resume_path),
    "trainer.device": to("run.device"),
    "trainer.use_legacy_worker_impl": ignored("there is one implementation of workers"),
    "ray_init.num_cpus": to("placement.cpu_slots"),
    "ray_kwargs.ray_init.num_cpus": to("placement.cpu_slots"),
}

PREFIXES: Mapping[str, str] = {
    "custom_reward_function.reward_kwargs.": "reward.options.",
    "actor_rollout_ref.rollout.engine_kwargs.vllm.": "rollout.engine_options.",
    "actor_rollout_ref.rollout.engine_kwargs.sglang.": "rollout.engine_options.",
}
"""Sections of free keys."""

SHORT_FORMS = ("actor_rollout_ref.", "data.", "trainer.")
"""Documents about verl often leave these out: `actor.optim.lr`, `train_batch_size`."""

SECTIONS = frozenset({"actor_rollout_ref", "trainer", "custom_reward_function", "reward_model", "reward_manager", "ray_init"})
SECTIONS |= {"ray_kwargs", "global_profiler", "transfer_queue", "hydra", "npu_profile"}
"""Top-level sections that only verl has."""


def stands_for() -> dict[str, str]:
    """Each key of verl's with the one of ours that takes its value; empty where it is none, or more."""
    ours = {key: translation.becomes.split("`") for key, translation in KEYS.items()}
    return {key: parts[1] if len(parts) == 3 and not parts[0] else "" for key, parts in ours.items()}


def full_name(key: str) -> str:
    """`key` as verl's table has it, where a document left out its beginning."""
    return next((prefix + key for prefix in ("", *SHORT_FORMS) if prefix + key in KEYS), key)


def find(key: str) -> Translation | None:
    """The translation of `key`; one that fails with advice for an unknown key of verl's; None where it is none of verl's."""
    if translation := KEYS.get(full_name(key)):
        return translation
    for prefix, ours in PREFIXES.items():
        if key.startswith(prefix):
            return to(ours + key.removeprefix(prefix))
    if key.partition(".")[0] in SECTIONS or key.startswith(("critic.model.", "critic.optim.", "critic.fsdp")):
        near = difflib.get_close_matches(key, KEYS, 1, 0.9)
        guess = f"Did you mean {near[0]!r}? " if near else ""
        return nothing(f"leave it out. {guess}docs/configuration.md lists all that have one")
    return None
