"""What vLLM's engine is built with, and what is said where it cannot be."""

from __future__ import annotations

import dataclasses
import logging
import re

import torch
import torch.distributed as dist
from vllm import EngineArgs, exceptions

from hybridflow.config.rules_engine import VLLM_KEYS
from hybridflow.errors import EngineError
from hybridflow.registry import nearest
from hybridflow.rollout.base import EngineSpec

logger = logging.getLogger("hybridflow")

REFUSALS: tuple[type[Exception], ...] = (ValueError, getattr(exceptions, "VLLMError", ValueError))
"""What vLLM raises for what it cannot do, pydantic's errors among them; a class of its own in 0.32."""
OF_PYDANTIC = re.compile(r"\s*(\[type=.*?\]$|For further information visit .*$)", re.MULTILINE)
"""What its errors say beside what is wrong."""


def engine_arguments(spec: EngineSpec) -> dict[str, object]:
    """What the engine is built with: ours, then the user's options over them."""
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    on_cpu = spec.device.type == "cpu"
    _check_options(spec, known)
    arguments: dict[str, object] = {
        "model": spec.model,
        "tokenizer": spec.tokenizer or spec.model,
        "trust_remote_code": spec.trust_remote_code,
        "dtype": spec.dtype,
        "seed": spec.seed,
        "max_model_len": spec.max_model_tokens,
        "max_num_seqs": spec.max_num_seqs,
        "tensor_parallel_size": spec.layout.tensor,
        "enforce_eager": spec.enforce_eager or on_cpu,  # there are no CUDA graphs to gain, and compiling takes a minute
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if "scheduler_cls" in known and "speculative_config" not in spec.options:
        arguments["scheduler_cls"] = _scheduler()
    if "use_tqdm_on_load" in known:  # a bar becomes dozens of lines on its way through Ray
        arguments["use_tqdm_on_load"] = False
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = int(spec.cpu_cache_gib * 2**30)
        # A prompt in several chunks breaks requests with a seed: see _check_options.
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, spec.max_model_tokens)}
    else:
        arguments |= {"gpu_memory_utilization": spec.gpu_memory_utilization, "enable_sleep_mode": spec.can_sleep}
        # All prompts of a step come at once. vLLM's own 2,048 takes tens of steps of its scheduler to take them in.
        arguments["max_num_batched_tokens"] = 8192
        if "async_scheduling" in known:  # the next step is scheduled while this one runs
            arguments["async_scheduling"] = True
        if "compilation_config" in known and not arguments["enforce_eager"]:
            most = min(spec.max_num_seqs, spec.most_rows or spec.max_num_seqs)  # each size takes part of a second to capture
            arguments["compilation_config"] = {"cudagraph_capture_sizes": capture_sizes(most)}
    if _is_one_of_many(spec):
        arguments["distributed_executor_backend"] = "external_launcher"
        # vLLM's own all-reduce asks about all devices of its ranks; where each process sees one, NCCL's takes its place.
        arguments["disable_custom_all_reduce"] = torch.cuda.device_count() < spec.layout.tensor
    return arguments | spec.options


def capture_sizes(most: int) -> list[int]:
    """Numbers of requests for which decode steps are captured as CUDA graphs, up to `most` that run at once. vLLM's own end at
    512: with more requests every kernel is launched from Python, and a step takes three times as long.

    Example:
        >>> capture_sizes(40)
        [1, 2, 4, 8, 16, 24, 32, 40]
    """
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, 513, 32), *range(576, 2049, 64)}
    return sorted({size for size in sizes if size < most} | {min(most, max(sizes))})


def _scheduler() -> type | None:
    """Ours, or None for vLLM's own, which then looks at every token, where a release has moved what ours is made of."""
    try:
        from hybridflow.rollout.vllm_scheduler import MultiStepScheduler
    except ImportError as error:
        logger.warning("vLLM's own scheduler runs before every token, which is slower: %s", error)
        return None
    return MultiStepScheduler


def _is_one_of_many(spec: EngineSpec) -> bool:
    """Whether torch.distributed spans several ranks, which vLLM must then build its own groups from."""
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    if spec.layout.tensor > num_ranks:
        raise EngineError(
            f"rollout.tensor_parallel={spec.layout.tensor} needs as many ranks in torch.distributed; found {num_ranks}"
        )
    return num_ranks > 1


def _check_options(spec: EngineSpec, known: set[str]) -> None:
    if unknown := [name for name in spec.options if name not in known]:
        raise EngineError(f"rollout.engine_options.{unknown[0]} is no argument of vLLM's engine{nearest(unknown[0], known)}")
    # vLLM winds the generators of requests back by Generator.set_offset, which torch has for CUDA only.
    if spec.device.type == "cpu" and spec.seed_requests and spec.options.get("enable_chunked_prefill"):
        raise EngineError(
            "rollout.engine_options.enable_chunked_prefill: on a CPU vLLM cannot take prompts in chunks where requests have "
            "seeds of their own. Leave it out, or set rollout.seed_requests=false"
        )


def why_not_started(error: Exception, spec: EngineSpec) -> str:
    """What vLLM says, in the words of our keys."""
    found = OF_PYDANTIC.sub("", str(error))
    lines = [f"vLLM did not start: {found}"]
    named = VLLM_KEYS | {"kv-cache-memory-bytes": "rollout.cpu_cache_gib"}
    lines += [f"What vLLM calls {name} is {key} here." for name, key in named.items() if re.search(rf"\b{name}\b", found)]
    if spec.options:
        lines.append(f"It was given rollout.engine_options={spec.options}.")
    return "\n".join(lines)
