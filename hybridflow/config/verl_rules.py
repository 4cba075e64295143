"""Rules of the table in verl_keys.py: what several keys of verl's mean together. Each is given all of them as one set, so that
the order in which they were given cannot matter, and yields keys of ours with their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Protocol

from hybridflow.config.pools import parse_pool
from hybridflow.config.ranges import COUNT
from hybridflow.config.verl_correction import correction
from hybridflow.config.verl_values import (
    AGGREGATION,
    KL_ESTIMATOR,
    TRUNCATION,
    UntranslatableError,
    as_list,
    as_type,
    choice,
    is_true,
)
from hybridflow.errors import PlacementError

ACTOR, ROLLOUT, REF, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref", "model"))
OVERLONG = "reward_model.reward_kwargs.overlong_buffer_cfg"
Values = Iterator[tuple[str, object]]


class Given(Protocol):
    """verl's keys as one set, and what of ours is decided before."""

    algorithm: str
    """Its name here."""
    pool: str
    """`placement.pools.main` as our key gives it; empty where it does not."""
    engine: str
    """`rollout.engine`, likewise."""

    def __call__(self, key: str) -> object:
        """The value of verl's key, or verl's default."""

    def has(self, key: str) -> bool:
        """Whether verl's key is given, and not as null."""


Rule = Callable[[Given], Values]

OF_ESTIMATOR = {
    "gae": "ppo",
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "grpo_passk": "grpo_pass_at_k",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "remax": "remax",
    "reinforce_plus_plus": "reinforce_plus_plus",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus_baseline",
    "opo": "opo",
    "gdpo": "gdpo",
}
"""Algorithms with the clipped ratio, loss_mode vanilla."""
OF_LOSS = {"gspo": "gspo", "cispo": "cispo", "geo_mean": "gmpo", "sapo": "sapo", "kl_cov": "kl_cov", "clip_cov": "clip_cov"}
OF_LOSS |= {"dppo_tv": "dppo", "dppo_kl": "dppo", "dro": "dro"}
"""Algorithms with the advantages of GRPO."""
WITHOUT_GROUPS = ("ppo", "remax", "reinforce_plus_plus")
"""Algorithms here that compare a response with no others to its prompt."""
ALWAYS_BY_STD = ("gdpo", "dapo", "gspo", "cispo", "gmpo", "sapo", "kl_cov", "clip_cov")
"""Algorithms here that divide by the standard deviation of a group, whatever norm_adv_by_std_in_grpo says."""
OWN_AGGREGATION = ("sapo", "geo_mean")
"""Losses that verl aggregates as the mean over rows of their means, whatever loss_agg_mode says."""


def algorithm(given: Given) -> Values:
    """The algorithm whose advantages and whose loss are those of verl's two keys."""
    estimator, mode = str(given("algorithm.adv_estimator")), loss_mode(given)
    is_clipped = mode in ("vanilla", "gpg")  # gpg is the same without a ratio: see `loss`
    name = OF_ESTIMATOR.get(estimator) if is_clipped else OF_LOSS.get(mode) if OF_ESTIMATOR.get(estimator) == "grpo" else None
    if estimator == mode == "gpg":
        yield "algorithm.name", "gpg"
        yield "algorithm.informative", "rewards"  # as in the authors' code, which verl's follows
        return
    is_filtered = is_true(given("algorithm.filter_groups.enable"))
    if is_filtered or has_overlong_buffer(given):
        if name in WITHOUT_GROUPS:
            problem = f"filtered groups and the overlong buffer come with algorithms of groups here, found {estimator}"
            raise UntranslatableError(f"{problem}. Set both enable to False, or adv_estimator to grpo")
        name = "dapo" if name == "grpo" else name
        yield "algorithm.dynamic_sampling", is_filtered
    if name is None:
        pairs = f"{', '.join(OF_ESTIMATOR)} with vanilla or gpg; grpo with {', '.join(OF_LOSS)}; gpg with gpg"
        problem = f"no algorithm here has the advantages of {estimator!r} and the loss {mode!r}; there are {pairs}"
        raise UntranslatableError(f"{problem}. Set algorithm to one of docs/algorithms.md, or to your own as module:Class")
    yield "algorithm.name", name


def loss_mode(given: Given) -> str:
    """verl's, in the spelling of its later releases."""
    return str(given(f"{ACTOR}.policy_loss.loss_mode")).replace("-", "_")


def has_overlong_buffer(given: Given) -> bool:
    """Whether DAPO's punishment of long responses is on."""
    return given("reward_model.reward_manager") == "dapo" and is_true(given(f"{OVERLONG}.enable"))


def overlong(given: Given) -> Values:
    """Punishment of long responses, and how often prompts are drawn."""
    if given.algorithm in WITHOUT_GROUPS:
        return
    rounds = given("algorithm.filter_groups.max_num_gen_batches")
    if isinstance(rounds, int) and rounds > 0:
        yield "algorithm.max_rounds", rounds
    is_on = has_overlong_buffer(given)
    yield "algorithm.overlong_penalty", given(f"{OVERLONG}.penalty_factor") if is_on else 0.0
    if is_on:
        yield "algorithm.overlong_buffer_tokens", given(f"{OVERLONG}.len")


def clip(given: Given) -> Values:
    """Both sides of the clip."""
    sides = [f"{ACTOR}.clip_ratio_{side}" for side in ("low", "high")]
    yield "algorithm.clip", [given(side if given.has(side) else f"{ACTOR}.clip_ratio") for side in sides]


def loss(given: Given) -> Values:
    """What belongs to the loss that is on."""
    policy_loss, mode = f"{ACTOR}.policy_loss", loss_mode(given)
    yield "algorithm.dual_clip", given(f"{ACTOR}.clip_ratio_c") if mode == "vanilla" else None
    critics = "critic.loss_agg_mode" if given.has("critic.loss_agg_mode") else f"{ACTOR}.loss_agg_mode"
    yield "algorithm.value_loss_aggregation", AGGREGATION(given(critics))
    is_penalised = is_true(given(f"{ACTOR}.use_kl_loss")) or given(f"{ACTOR}.entropy_coeff") not in (None, 0)
    aggregation = AGGREGATION(given(f"{ACTOR}.loss_agg_mode"))
    if mode not in OWN_AGGREGATION:
        yield "algorithm.loss_aggregation", aggregation
    elif is_penalised and aggregation != "sequence_mean":
        problem = f"{mode} is averaged by rows, but its KL and entropy by loss_agg_mode; here all have one way"
        raise UntranslatableError(f"{problem}. Set {ACTOR}.loss_agg_mode=seq-mean-token-mean")
    if mode == "gpg" and given.algorithm != "gpg":
        yield "algorithm.surrogate", "policy_gradient"
    if mode in ("clip_cov", "kl_cov"):
        yield "algorithm.share", given(f"{policy_loss}.{mode}_ratio")
    if mode == "clip_cov":
        yield "algorithm.bounds", [given(f"{policy_loss}.clip_cov_lb"), given(f"{policy_loss}.clip_cov_ub")]
    if mode in ("dppo_tv", "dppo_kl"):
        yield "algorithm.divergence", mode.removeprefix("dppo_")
        yield "algorithm.ratio_cap", given(f"{ACTOR}.clip_ratio_c")
    if mode == "dro":
        if not given.has(f"{policy_loss}.dro_beta"):
            raise UntranslatableError(f"the loss dro needs its weight. Set {policy_loss}.dro_beta")
        yield "algorithm.beta", given(f"{policy_loss}.dro_beta")
    if mode == "kl_cov":
        yield "algorithm.covariance_kl", given(f"{policy_loss}.ppo_kl_coef")
    if mode == "sapo":
        for verl, ours in (("tau_pos", "tau_positive"), ("tau_neg", "tau_negative")):
            yield f"algorithm.{ours}", given(f"{policy_loss if given.has(f'{policy_loss}.{verl}') else ACTOR}.{verl}")


def scale(given: Given) -> Values:
    """Whether advantages are divided by the standard deviation of their group; those of GPG never are."""
    if given.algorithm == "gpg":
        return
    by_std = is_true(given("algorithm.norm_adv_by_std_in_grpo"))
    if not by_std and given.algorithm in ALWAYS_BY_STD:
        raise UntranslatableError(
            f"found False, but {given.algorithm} always divides. Set it to True, or algorithm to grpo or dppo"
        )
    yield "algorithm.scale_by_std", by_std


def kl(given: Given) -> Values:
    """The KL to the reference: in the reward, in the loss, or nowhere. Coefficient and estimator are those of where it is."""
    in_reward, in_loss = is_true(given("algorithm.use_kl_in_reward")), is_true(given(f"{ACTOR}.use_kl_loss"))
    if in_reward and in_loss:
        advice = "Set algorithm.use_kl_in_reward or actor_rollout_ref.actor.use_kl_loss to False"
        raise UntranslatableError(f"use_kl_in_reward and use_kl_loss are both True, but the KL counts once. {advice}")
    if in_reward and given.algorithm == "gdpo":
        advice = "Set algorithm.use_kl_in_reward to False, or actor_rollout_ref.actor.use_kl_loss to True"
        raise UntranslatableError(f"verl computes a KL in the reward for gdpo and does not use it. {advice}")
    yield "algorithm.kl_in", "reward" if in_reward else "loss" if in_loss else "none"
    if in_loss:
        yield "algorithm.kl_coefficient", given(f"{ACTOR}.kl_loss_coef")
        yield "algorithm.kl_estimator", KL_ESTIMATOR(given(f"{ACTOR}.kl_loss_type"))
    if in_reward:
        yield "algorithm.kl_coefficient", given("algorithm.kl_ctrl.kl_coef")
        yield "algorithm.kl_estimator", KL_ESTIMATOR(given("algorithm.kl_penalty"))
        yield "algorithm.kl_controller", given("algorithm.kl_ctrl.type")
        if given("algorithm.kl_ctrl.type") == "adaptive":
            yield "algorithm.kl_target", given("algorithm.kl_ctrl.target_kl")
            yield "algorithm.kl_horizon", given("algorithm.kl_ctrl.horizon")


def pf_ppo(given: Given) -> Values:
    """Rows drawn again by their rewards, which other algorithms pass over in verl, too."""
    if given.algorithm == "ppo" and is_true(given("algorithm.use_pf_ppo")):
        power = given("algorithm.pf_ppo.weight_pow")
        known = choice("Set it to one of these", pow=power, max_min="best_and_worst", max_random="best")
        yield "algorithm.resampling", known(given("algorithm.pf_ppo.reweight_method"))


def grad_clip(given: Given) -> Values:
    """The largest norm of gradients, which releases of verl read under one of three names."""
    for section, ours in ((ACTOR, "actor"), ("critic", "critic")):
        names = [name for name in ("grad_clip", "optim.clip_grad", "optim.grad_clip") if given.has(f"{section}.{name}")]
        norms = [as_type(float, given(f"{section}.{name}")) for name in names or ["grad_clip"]]
        if any(norm != norms[0] for norm in norms):
            problem = f"releases of verl read {' or '.join(names)}, which say {' and '.join(map(str, norms))}"
            raise UntranslatableError(f"{problem}. Set {ours}.max_grad_norm, or all of them to one number")
        yield f"{ours}.max_grad_norm", norms[0]


def lora(given: Given) -> Values:
    """Rank and scale of the adapters, of which scripts set both to 0 where there are none."""
    rank = given(f"{MODEL}.lora_rank")
    yield "model.lora_rank", rank
    yield "model.lora_alpha", given(f"{MODEL}.lora_alpha") or (0 if rank else 16)


def overlong_prompts(given: Given) -> Values:
    """Filtering goes before truncation."""
    is_dropped = is_true(given("data.filter_overlong_prompts"))
    yield "data.overlong_prompts", "drop" if is_dropped else TRUNCATION(given("data.truncation"))


MICROBATCHES = {
    "actor": (f"{ACTOR}.ppo_micro_batch_size", f"{ACTOR}.ppo_max_token_len_per_gpu", f"{ACTOR}.use_dynamic_bsz"),
    "critic": ("critic.ppo_micro_batch_size", "critic.ppo_max_token_len_per_gpu", "critic.use_dynamic_bsz"),
    "reference": (
        f"{REF}.log_prob_micro_batch_size",
        f"{REF}.log_prob_max_token_len_per_gpu",
        f"{REF}.log_prob_use_dynamic_bsz",
    ),
    "reward_model": (
        "reward_model.micro_batch_size",
        "reward_model.forward_max_token_len_per_gpu",
        "reward_model.use_dynamic_bsz",
    ),
}
"""Rows of a microbatch, tokens of one, and whether the latter count."""


def microbatch(given: Given) -> Values:
    """Tokens of a microbatch: verl's own number, or rows that are each as long as prompt and response can be."""
    row = _count(given("data.max_prompt_length")) + _count(given("data.max_response_length"))
    for role, (rows, tokens, dynamic) in MICROBATCHES.items():
        is_dynamic = is_true(given(dynamic if given.has(dynamic) else f"{ACTOR}.use_dynamic_bsz"))
        value = given(tokens)
        if given.has(f"{rows}_per_gpu") and not is_dynamic:
            value = _count(given(f"{rows}_per_gpu")) * row
        elif given.has(rows) and not is_dynamic:
            value = max(1, _count(given(rows)) // _ranks(given)) * row
        if value is not None:
            yield f"{role}.tokens_per_microbatch", value


def warmup(given: Given) -> Values:
    """Steps, or a share of the run."""
    for section, ours in ((ACTOR, "actor"), ("critic", "critic")):
        steps = given(f"{section}.optim.lr_warmup_steps")
        if isinstance(steps, int) and steps > 0:
            yield f"{ours}.warmup_steps", steps
        else:
            yield f"{ours}.warmup_ratio", given(f"{section}.optim.lr_warmup_steps_ratio")


def validation(given: Given) -> Values:
    """Greedy where sampling is switched off."""
    key = f"{ROLLOUT}.val_kwargs.do_sample"
    is_greedy = given.has(key) and not is_true(given(key))
    yield "validation.temperature", 0.0 if is_greedy else given(f"{ROLLOUT}.val_kwargs.temperature")


def trust(given: Given) -> Values:
    """One for all models."""
    asked = [is_true(given(f"{section}.trust_remote_code")) for section in ("data", MODEL, "critic.model")]
    yield "model.trust_remote_code", any(asked)


def checkpointing(given: Given) -> Values:
    """One for all models: what saves memory for one of them changes no result of another."""
    keys = [f"{part}.enable_gradient_checkpointing" for part in (MODEL, "critic.model")]
    if asked := [is_true(given(key)) for key in keys if given.has(key)]:
        yield "model.gradient_checkpointing", any(asked)


def sequence_parallel(given: Given) -> Values:
    """One for all models."""
    keys = [f"{section}.ulysses_sequence_parallel_size" for section in (ACTOR, REF, "critic")]
    if asked := [_count(given(key)) for key in keys if given.has(key)]:
        yield "model.sequence_parallel", max(asked)


def pool(given: Given) -> Values:
    """Nodes times ranks, and how many of these share an engine."""
    yield "placement.pools.main", f"{_count(given('trainer.nnodes'))}x{_count(given('trainer.n_gpus_per_node'))}"
    key = f"{ROLLOUT}.tensor_model_parallel_size"
    # With verl's default an odd number of ranks would not start. Other engines have one rank each here.
    is_one = engine(given) != "vllm" or (not given.has(key) and _ranks(given) % 2)
    yield "rollout.tensor_parallel", 1 if is_one and given(key) else given(key)


def engine(given: Given) -> str:
    """The engine in verl's words, where our key does not name it."""
    return given.engine or str(given(f"{ROLLOUT}.name") or "vllm")


def context(given: Given) -> Values:
    """Only what is more than prompt and response needs to be said."""
    longest, asked = _count(given("data.max_prompt_length")) + _count(given("data.max_response_length")), None
    if (asked := given(f"{ROLLOUT}.max_model_len")) is not None and _count(asked) > longest:
        yield "rollout.max_model_tokens", asked


def of_vllm(given: Given) -> Values:
    """Arguments of vLLM where it is the engine."""
    for name in ("max_num_batched_tokens", "enable_chunked_prefill"):
        if engine(given) == "vllm" and given.has(f"{ROLLOUT}.{name}"):
            yield f"rollout.engine_options.{name}", given(f"{ROLLOUT}.{name}")


def episodes(given: Given) -> Values:
    """Tools and interactions as an environment, and the reward function for all that was said."""
    turns, options = f"{ROLLOUT}.multi_turn", "environment.options"
    files = [name for name in ("tool_config_path", "interaction_config_path") if given.has(f"{turns}.{name}")]
    if not files:
        return
    yield "environment.name", "hybridflow.environments.verl_tools:VerlEpisode"
    for name in (*files, "max_parallel_calls", "max_tool_response_length"):
        yield f"{options}.{name}", given(f"{turns}.{name}")
    sides = choice("Set it to left, middle or right", left="left", middle="middle", right="right")
    yield f"{options}.tool_response_truncate_side", sides(given(f"{turns}.tool_response_truncate_side"))
    limits = [_count(given(f"{turns}.max_assistant_turns"))] if given.has(f"{turns}.max_assistant_turns") else []
    limits += [1 + _count(given(f"{turns}.max_user_turns"))] if given.has(f"{turns}.max_user_turns") else []
    most = min(limits, default=_count(given("data.max_response_length")))  # a turn has at least one token
    yield f"{options}.max_turns", most
    yield "environment.max_turns", most
    known = choice("Set it to hermes, or to your model's own", hermes="hermes", llama3_json="llama3")
    yield "environment.tool_format", known(given(f"{turns}.format"))
    yield "environment.add_reward", "all"


def engine_options(given: Given) -> Values:
    """Arguments of the engine that runs; those of others count nothing in verl either."""
    name = engine(given)
    options = given(f"{ROLLOUT}.engine_kwargs.{name}") if name in ("vllm", "sglang") else None
    for key, value in options.items() if isinstance(options, Mapping) else ():
        # The exception is about models that see; newer releases of vLLM do not take it.
        if value is not None and key != "disable_mm_preprocessor_cache":
            yield f"rollout.engine_options.{key}", value


def own_reward(given: Given) -> Values:
    """The user's function where a path is given."""
    if given.has("custom_reward_function.path"):
        yield "reward.path", given("custom_reward_function.path")
        yield "reward.function", given("custom_reward_function.name")


def reward_manager(given: Given) -> Values:
    """Nothing: how functions are called follows from their parameters."""
    known = ("naive", "batch", "prime", "dapo", "rate_limited", "remote", "limited", "gdpo")
    if (manager := given("reward_model.reward_manager")) not in known:
        advice = "Name the function that scores instead: custom_reward_function.path"
        raise UntranslatableError(f"found {manager!r}; allowed: {', '.join(known)}. {advice}")
    yield from ()


def reward_model(given: Given) -> Values:
    """Its score is the reward, alone, as in verl."""
    if not is_true(given("reward_model.enable")):
        return
    if given.has("custom_reward_function.path"):
        advice = "A function that asks a model is a judge (docs/rewards.md): set reward_model.enable to False"
        raise UntranslatableError(f"with custom_reward_function.path verl's reward model answers the function. {advice}")
    if not given.has("reward_model.model.path"):
        raise UntranslatableError("reward_model.enable is True, and no model is named. Set reward_model.model.path")
    yield "reward_model.path", given("reward_model.model.path")
    yield "reward.name", "none" if is_true(given("reward_model.enable")) else ""


def saving(given: Given) -> Values:
    """Never is never, also at the end."""
    every = given("trainer.save_freq")
    is_never = every is None or (isinstance(every, int) and every <= 0)
    yield "checkpoint.every_steps", 0 if is_never else every
    yield "checkpoint.save_last", not is_never


def resume(given: Given) -> Values:
    """The path counts where the mode says so."""
    if given("trainer.resume_mode") != "resume_path":
        known = choice("Set it to auto, disable or resume_path", auto="auto", disable="never")
        yield "checkpoint.resume", known(given("trainer.resume_mode"))
    elif given.has("trainer.resume_from_path"):
        yield "checkpoint.resume", given("trainer.resume_from_path")
    else:
        raise UntranslatableError("resume_mode is resume_path, and there is none. Set trainer.resume_from_path")


def hydra_defaults(given: Given) -> Values:
    """Nothing: of the files that a file of verl's may build on, verl's own are here already."""
    entries = as_list(given("defaults"))
    if others := [entry for entry in entries if entry not in ("ppo_trainer", "_self_")]:
        raise UntranslatableError(f"found {others[0]!r}; groups of Hydra's are not read. Name one file with `base: FILE.yaml`")
    yield from ()


_RULES = [
    algorithm,
    overlong,
    clip,
    loss,
    scale,
    kl,
    correction,
    pf_ppo,
    grad_clip,
    lora,
    overlong_prompts,
    microbatch,
    warmup,
    validation,
    trust,
    checkpointing,
    sequence_parallel,
    pool,
    context,
    of_vllm,
    engine_options,
    episodes,
    own_reward,
    reward_manager,
    reward_model,
    saving,
    resume,
    hydra_defaults,
]
RULES: Mapping[str, Rule] = {rule.__name__: rule for rule in _RULES}


def _ranks(given: Given) -> int:
    try:
        size = parse_pool(given.pool)
    except PlacementError:
        return _count(given("trainer.nnodes")) * _count(given("trainer.n_gpus_per_node"))
    return size.nodes * size.ranks_per_node


def _count(value: object) -> int:
    return int(str(as_type(Annotated[int, COUNT], value)))
