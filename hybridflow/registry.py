"""The tables of what can be named in a configuration. A new part is one file and one line here, or no line at all:
a name with a colon, `my_package.module:Class` or `path/to/file.py:Class`, is imported as it stands.

The tables hold strings, so that looking a name up imports nothing; `load` imports on use.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping

from hybridflow.errors import ConfigError, FieldError, UserFileError
from hybridflow.user_file import import_file, split_name

ALGORITHMS = {
    "ppo": "hybridflow.algorithms.ppo:PPO",
    "ppo_ptx": "hybridflow.algorithms.ppo_ptx:PPOPtx",
    "grpo": "hybridflow.algorithms.grpo:GRPO",
    "sft": "hybridflow.algorithms.sft:SFT",
    "reward_model": "hybridflow.algorithms.reward_model:RewardModelling",
    "dpo": "hybridflow.algorithms.dpo:DPO",
    "rloo": "hybridflow.algorithms.rloo:RLOO",
    "remax": "hybridflow.algorithms.remax:ReMax",
    "reinforce_plus_plus": "hybridflow.algorithms.reinforce_plus_plus:ReinforcePlusPlus",
    "reinforce_plus_plus_baseline": "hybridflow.algorithms.reinforce_plus_plus_baseline:ReinforcePlusPlusBaseline",
    "dapo": "hybridflow.algorithms.dapo:DAPO",
    "dr_grpo": "hybridflow.algorithms.dr_grpo:DrGRPO",
    "gspo": "hybridflow.algorithms.gspo:GSPO",
    "cispo": "hybridflow.algorithms.cispo:CISPO",
    "gmpo": "hybridflow.algorithms.gmpo:GMPO",
    "opo": "hybridflow.algorithms.opo:OPO",
    "gpg": "hybridflow.algorithms.gpg:GPG",
    "dro": "hybridflow.algorithms.dro:DRO",
    "sapo": "hybridflow.algorithms.sapo:SAPO",
    "kl_cov": "hybridflow.algorithms.kl_cov:KLCov",
    "clip_cov": "hybridflow.algorithms.clip_cov:ClipCov",
    "distillation": "hybridflow.algorithms.distillation:Distillation",
    "safe_rlhf": "hybridflow.algorithms.safe_rlhf:SafeRLHF",
    "dppo": "hybridflow.algorithms.dppo:DPPO",
    "gdpo": "hybridflow.algorithms.gdpo:GDPO",
    "grpo_pass_at_k": "hybridflow.algorithms.grpo_pass_at_k:GRPOPassAtK",
}

ROLES = {
    "data": "hybridflow.workers.data:DataWorker",
    "actor": "hybridflow.workers.actor:ActorWorker",
    "critic": "hybridflow.workers.critic:CriticWorker",
    "reference": "hybridflow.workers.reference:ReferenceWorker",
    "rollout": "hybridflow.workers.rollout:RolloutWorker",
    "reward": "hybridflow.workers.reward:RewardWorker",
    "reward_model": "hybridflow.workers.reward_model:RewardModelWorker",
    "teacher": "hybridflow.workers.reference:ReferenceWorker",
    "cost_model": "hybridflow.workers.reward_model:RewardModelWorker",
    "validation": "hybridflow.workers.rollout:ValidationWorker",
    "pretraining": "hybridflow.workers.pretraining:PretrainingWorker",
}

ENGINES = {
    "torch": "hybridflow.rollout.torch_engine:TorchEngine",
    "vllm": "hybridflow.rollout.vllm_engine:VllmEngine",
    "sglang": "hybridflow.rollout.sglang_engine:SglangEngine",
}

REWARDS = {
    "gsm8k": "hybridflow.rewards.gsm8k:compute_score",
    "gsm8k_flexible": "hybridflow.rewards.gsm8k:compute_score_flexible",
    "math": "hybridflow.rewards.math:compute_score",
    "by_data_source": "hybridflow.rewards.by_data_source:compute_score",
    "multiple_choice": "hybridflow.rewards.multiple_choice:compute_score",
    "exact_match": "hybridflow.rewards.exact_match:compute_score",
    "format": "hybridflow.rewards.text_terms:format_score",
    "length": "hybridflow.rewards.text_terms:length_score",
    "code": "hybridflow.rewards.code:compute_score",
    "judge": "hybridflow.rewards.judge:compute_score",
    "http": "hybridflow.rewards.http:compute_score",
    "none": "hybridflow.rewards.none:compute_score",
}

TRACKERS = {
    "console": "hybridflow.trackers.console:ConsoleTracker",
    "jsonl": "hybridflow.trackers.jsonl:JsonlTracker",
    "tensorboard": "hybridflow.trackers.tensorboard:TensorboardTracker",
    "wandb": "hybridflow.trackers.wandb:WandbTracker",
    "mlflow": "hybridflow.trackers.mlflow:MlflowTracker",
}

PROTOCOLS = {
    "one_to_all": "hybridflow.controller.protocols:OneToAll",
    "split_by_data_rank": "hybridflow.controller.protocols:SplitByDataRank",
    "rank_zero": "hybridflow.controller.protocols:RankZero",
    "gather_rows": "hybridflow.controller.protocols:GatherRows",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or an empty string where none is close.

    Example:
        >>> nearest('gpro', ['grpo', 'ppo'])
        "; did you mean 'grpo'?"
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def unknown_name(name: str, table: Mapping[str, str]) -> str | None:
    """Why `name` cannot be looked up in `table`, as a sentence, or None where it can. Imports nothing.

    Example:
        >>> unknown_name("gms8k", {"gsm8k": "..."})
        "'gms8k' is not known; did you mean 'gsm8k'? Known: gsm8k; or your own as module:Name or file.py:Name"
        >>> unknown_name("my_rewards:Judge", {"gsm8k": "..."}) is None
        True
    """
    if name in table or ":" in name:
        return None
    own = "your own as module:Name or file.py:Name"
    return f"{name!r} is not known{nearest(name, table) or '.'} Known: {', '.join(sorted(table))}; or {own}"


def load(name: str, table: Mapping[str, str], *, key: str) -> object:
    """The object that `name` stands for.

    `key` is the configuration key that holds the name, for the message.

    Raises:
        ConfigError: the name is unknown, its module does not import, or the module lacks the attribute.
    """
    if problem := unknown_name(name, table):
        raise ConfigError([FieldError(key, problem)])
    module_name, attribute = split_name(name) or table.get(name, name).partition(":")[::2]
    try:
        module = import_file(module_name) if split_name(name) else importlib.import_module(module_name)
    except UserFileError as error:
        raise ConfigError([FieldError(key, f"{name!r}: {error}")]) from error
    except ImportError as error:
        raise ConfigError(
            [FieldError(key, f"{name!r} needs module {module_name!r}, which does not import: {error}")]
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError([FieldError(key, f"module {module_name!r} has no {attribute!r}{nearest(attribute, dir(module))}")])
    loaded: object = getattr(module, attribute)
    return loaded
