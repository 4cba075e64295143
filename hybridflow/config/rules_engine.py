"""Rules about generation engines: what their options may say, and the log-probabilities that they give."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hybridflow.config.rules_placement import uses_gpus
from hybridflow.config.schema import Config
from hybridflow.errors import FieldError
from hybridflow.registry import nearest

KEYS_OF_ENGINES = {
    "model.path": ("model", "model_path"),
    "model.tokenizer": ("tokenizer", "tokenizer_path"),
    "model.trust_remote_code": ("trust_remote_code", "trust_remote_code"),
    "rollout.dtype": ("dtype", "dtype"),
    "run.seed": ("seed", "random_seed"),
    "data.max_prompt_tokens and data.max_response_tokens, or rollout.max_model_tokens": ("max_model_len", "context_length"),
    "rollout.max_num_seqs": ("max_num_seqs", "max_running_requests"),
    "rollout.tensor_parallel": ("tensor_parallel_size", "tp_size"),
    "rollout.enforce_eager": ("enforce_eager", "disable_cuda_graph"),
    "rollout.gpu_memory_utilization (on a CPU rollout.cpu_cache_gib)": ("gpu_memory_utilization", "mem_fraction_static"),
    "rollout.sleep": ("enable_sleep_mode", "enable_memory_saver"),
}
"""What a key of ours sets: vLLM's argument, and SGLang's."""
VLLM_KEYS = {vllm: ours for ours, (vllm, _) in KEYS_OF_ENGINES.items()}
SGLANG_KEYS = {sglang: ours for ours, (_, sglang) in KEYS_OF_ENGINES.items()}
SGLANG_KEYS |= {"enable_deterministic_inference": "rollout.seed_requests"}


@dataclass(frozen=True)
class EngineArguments:
    """What an engine's constructor takes."""

    keys: Mapping[str, str]
    """Those that have a key of ours, which `rollout.engine_options` must not contradict."""
    package: str = ""
    source: str = ""
    """The file below the package that has the class whose fields are all of them."""
    class_name: str = ""

    def names(self) -> set[str] | None:
        """All of them, read from the source: importing an engine takes ten seconds. None where they cannot be found."""
        if not self.package:
            return set()
        found = importlib.util.find_spec(self.package)
        paths = [Path(folder) / self.source for folder in (found and found.submodule_search_locations) or ()]
        tree = [node for path in paths if path.is_file() for node in ast.parse(path.read_text()).body]
        body = [line for node in tree if isinstance(node, ast.ClassDef) and node.name == self.class_name for line in node.body]
        targets = [line.target for line in body if isinstance(line, ast.AnnAssign)]
        return {target.id for target in targets if isinstance(target, ast.Name)} or None


ENGINES = {
    "torch": EngineArguments({}),
    "vllm": EngineArguments(VLLM_KEYS, "vllm", "engine/arg_utils.py", "EngineArgs"),
    "sglang": EngineArguments(SGLANG_KEYS, "sglang", "srt/server_args.py", "ServerArgs"),
}
"""The built-in ones."""
WHOLE = ("torch", "sglang")
"""Engines that do not share a model among ranks."""
CACHED_IN_CPU_MEMORY = ("vllm",)
"""Engines that take `rollout.cpu_cache_gib` where there is no GPU."""
LOG_PROBS_AFTER_FILTERS = ("vllm",)
"""Engines whose log-probabilities are, unless told otherwise, of the tokens that top_p, top_k and min_p leave."""


def options_are_known(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """Each engine option is an argument of a built-in engine that has no key of ours."""
    engine, options = config.rollout.engine, config.rollout.engine_options
    if engine not in ENGINES or "rollout" not in roles or not options:
        return
    arguments = ENGINES[engine]
    names = arguments.names()
    for name in options:
        key = f"rollout.engine_options.{name}"
        if name in arguments.keys:
            problem = f"{engine}'s {name} comes from {arguments.keys[name]}: set that, and leave this out"
        elif names == set():
            problem = f"the {engine} engine has no options. Leave it out, or set rollout.engine=vllm"
        elif names is not None and name not in names:
            problem = f"{engine}'s engine has no such argument{nearest(name, names)}"
        else:
            continue
        yield FieldError(key, problem, related=("rollout.engine",))


def engines_fit_their_ranks(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The engine can be sharded over as many ranks as asked, and on a CPU this machine has the memory of their caches."""
    rollout, engine = config.rollout, config.rollout.engine
    if "rollout" not in roles:
        return
    if engine in WHOLE and rollout.tensor_parallel > 1:
        problem = f"found {rollout.tensor_parallel}, but the {engine} engine does not shard weights"
        advice = "Use 1, or rollout.engine=vllm"
        yield FieldError("rollout.tensor_parallel", f"{problem}. {advice}", related=("rollout.engine",))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if engine in CACHED_IN_CPU_MEMORY and not uses_gpus(config) and rollout.cpu_cache_gib > memory_gib:
        problem = f"found {rollout.cpu_cache_gib:g} GiB for each rank, but this machine has {memory_gib:.1f}"
        advice = "Weights, optimizer and activations need their share too"
        about = ("rollout.engine", "run.device")
        yield FieldError("rollout.cpu_cache_gib", f"{problem}. {advice}", related=about, is_local=True)


def log_probs_are_of_all_tokens(config: Config, roles: tuple[str, ...]) -> Iterator[FieldError]:
    """The engine can give the log-probabilities that training computes: at the temperature, and before tokens are filtered."""
    rollout = config.rollout
    if rollout.engine not in LOG_PROBS_AFTER_FILTERS or "rollout" not in roles:
        return
    mode = rollout.engine_options.get("logprobs_mode", "processed_logprobs")
    filters = {"top_p": (rollout.top_p < 1, 1), "top_k": (rollout.top_k > 0, 0), "min_p": (rollout.min_p > 0, 0)}
    for name, (is_on, whole) in filters.items():
        if is_on and mode == "processed_logprobs":
            found = f"found {getattr(rollout, name)}"
            problem = f"{found}, and {rollout.engine} would give log-probabilities of the tokens left; training's are of all"
            advice = f"Set it to {whole}; or, at temperature 1, set rollout.engine_options.logprobs_mode=raw_logprobs"
            about = ("rollout.engine", "rollout.engine_options")
            yield FieldError(f"rollout.{name}", f"{problem}. {advice}", related=about)
    if mode != "processed_logprobs" and rollout.temperature != 1:
        problem = f"found {mode}, which is at temperature 1, and rollout.temperature={rollout.temperature}"
        advice = "Leave it out, or set the temperature to 1"
        about = ("rollout.engine", "rollout.temperature")
        yield FieldError("rollout.engine_options.logprobs_mode", f"{problem}. {advice}", related=about)
