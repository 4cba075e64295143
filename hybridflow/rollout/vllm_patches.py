"""All that reaches into private parts of vLLM, beside the scheduler's subclass in vllm_scheduler.py.

Written for 0.24 on CUDA and 0.32 on CPU. `HYBRIDFLOW_VLLM_PATCHES_OFF=sample_at_once,keep_chosen_log_probs` switches off those
that it names. Where a release has moved a private name, a warning tells so and vLLM's public way is taken.

| what | of vLLM | why | without it |
|---|---|---|---|
| `sample_at_once` | `topk_topp_sampler.random_sample`, first model runner | it launches a kernel of the whole vocabulary for every request that has a seed | CUDA: 512 requests take a third longer, and other tokens belong to a seed |
| `keep_chosen_log_probs` | `LogprobsProcessor._update_sample_logprobs` | it keeps ranks, texts, places and a sum for every token, which nobody reads | 512 requests take a tenth longer |
| `take_second_runner` | environment variable `VLLM_USE_V2_MODEL_RUNNER` | the first one prepares each step request by request in Python, the second on the device; vLLM takes it for a few architectures by name only | decode steps of 64 requests take 1.9 times as long; `VLLM_USE_V2_MODEL_RUNNER=0` switches it off |
| `MultiStepScheduler` | `AsyncScheduler`, by the option `scheduler_cls` | vLLM schedules before every token, in Python | generation takes up to twice as long; `engine_options.scheduler_cls` switches it off |
| `groups_of` | `parallel_state.init_model_parallel_group`, `VLLM_DIST_IDENT` | the ranks of an engine are numbered one after the other, without an option for another order | layouts in that order still start, others are refused |
| `keep_process_groups` | `engine_core._finalizer` (0.32) | a collected engine destroys the process groups of the whole process | training's groups end with the engine |
| `silence_internals` | names of loggers | they warn of what users cannot act on | more lines on the console |
| `partial_outputs` | `output_processor.request_states` | tokens of unfinished requests are given to streams alone | an interrupted request starts again from its prompt |
| `pack_heads` | `quant_method` of output layers (0.32, CPU) | a reload packs only layers that it is given weights for; with tied embeddings the output layer would keep the old ones | checksums stop the run |
| `pack_experts_at_reload` | `quant_method.moe_kernel` of experts (0.32, CPU) | a reload packs experts only when their kernel is made, which a reload does not do | the perturbed probe of the first sync stops the run |
| `weight_parts`, `held_weights` | `packed_modules_mapping`, `quant_method.apply` | weights are stacked, and packed on the CPU | no checksums of the engine's weights |
"""  # noqa: E501, a table

from __future__ import annotations

import importlib
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from vllm import LLMEngine, RequestOutput
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from hybridflow.errors import EngineError
from hybridflow.models.load import load_config
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import EngineSpec
from hybridflow.rollout.sampling import sample
from hybridflow.rollout.seeds import uniform

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.outputs import LogprobsLists

logger = logging.getLogger("hybridflow")

MOST_ELEMENTS_READ_BACK = 1 << 18
"""Of a weight that the CPU kernels have packed: reading it back is a matrix product, which larger ones are not worth."""
SHARED_MEMORY = Path("/dev/shm")
SWITCH = "HYBRIDFLOW_VLLM_PATCHES_OFF"
OFFSET_PER_TOKEN = 4
"""By which a kernel of random numbers moves a generator of CUDA."""


def _private(path: str) -> Any:
    """A private part of vLLM, "module:name" or "module:name.name"; None where this release has none."""
    module, _, names = path.partition(":")
    try:
        return attrgetter(names)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return None


SAMPLER = "vllm.v1.sample.ops.topk_topp_sampler"
sample_row_by_row: Callable[..., torch.Tensor] | None = _private(f"{SAMPLER}:random_sample")
"""vLLM's own, which `sample_at_once` replaces."""
LogprobsProcessor = _private("vllm.v1.engine.logprobs:LogprobsProcessor")
keep_all_log_probs: Callable[..., None] | None = _private("vllm.v1.engine.logprobs:LogprobsProcessor._update_sample_logprobs")
"""vLLM's own, which `keep_chosen_log_probs` replaces."""
make_group: Callable[..., object] | None = _private("vllm.distributed.parallel_state:init_model_parallel_group")
"""vLLM's own, which `groups_of` replaces."""
FusedMoEMethod: Any = _private("vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase")
SPEAK_OF_INTERNALS = (
    "config.scheduler",  # that the scheduler is not its own
    "config.vllm",  # that eager means no compiling
    "engine.arg_utils",  # that the random state of this process is used; that prompts are not taken in chunks
    "platforms.cpu",  # which parts a CPU does without
    "triton_utils.jit_monitor",  # that the first step compiles kernels
    "utils.jit_monitor",  # the same in 0.32
    "v1.engine.input_processor",  # that prompts should come through classes that other releases lack
    "v1.worker.cpu_worker",  # which allocators could be preloaded
)
"""Loggers of vLLM whose warnings tell our users nothing that they could act on."""


def replace_slow_parts(device: torch.device) -> None:
    """Put ours in the place of vLLM's sampling and keeping of log-probabilities, unless switched off."""
    off = {name.strip() for name in os.environ.get(SWITCH, "").split(",")}
    if device.type == "cuda" and "sample_at_once" not in off:
        if sample_row_by_row is None:
            logger.warning("this vLLM has no %s.random_sample, so requests with seeds are sampled one by one", SAMPLER)
        else:
            vars(importlib.import_module(SAMPLER))["random_sample"] = sample_at_once
    if "keep_chosen_log_probs" not in off:
        if keep_all_log_probs is None:
            logger.warning("this vLLM has no LogprobsProcessor._update_sample_logprobs, so it keeps more than is read")
        else:
            LogprobsProcessor._update_sample_logprobs = keep_chosen_log_probs


def take_second_runner(spec: EngineSpec) -> None:
    """Have vLLM take its second model runner on CUDA, where the model is text alone, dense, and of full attention, and nobody
    has decided otherwise."""
    if spec.device.type == "cuda" and is_plain(load_config(spec.model, trust_remote_code=spec.trust_remote_code)):
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")


def is_plain(config: PretrainedConfig) -> bool:
    """Whether a model is a dense decoder of text with full attention in all layers.

    Example:
        >>> from transformers import MixtralConfig, Qwen2Config
        >>> is_plain(Qwen2Config()), is_plain(MixtralConfig())
        (True, False)
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    has_experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    is_more = config.get_text_config() is not config or config.is_encoder_decoder or hasattr(config, "quantization_config")
    return kinds == {"full_attention"} and not (slides or has_experts or is_more)


def keep_chosen_log_probs(processor: Any, found: LogprobsLists) -> None:
    """In place of a method of vLLM that also keeps ranks, texts, places and a sum for every token, which nobody reads here: a
    tenth of the time of 512 requests, since generating them is bound by Python. Log-probabilities are [tokens, 1]."""
    is_chosen_only = processor.num_logprobs == 0 and hasattr(processor.logprobs, "logprobs")
    if is_chosen_only:
        processor.logprobs.logprobs.extend(found.logprobs[:, 0].tolist())
    else:
        assert keep_all_log_probs is not None
        keep_all_log_probs(processor, found)


def sample_at_once(probs_BV: torch.Tensor, generators: dict[int, torch.Generator], *options: object) -> torch.Tensor:
    """In place of a function of vLLM's first model runner, which launches a kernel of the whole vocabulary for every request
    that has a seed: a quarter of the time of 512 requests. Shape [B]. Rows without a seed, greedy ones among them, are sampled
    as before.

    A generator only counts its tokens here; where vLLM drops one it winds it back, by as much as a kernel would have moved it.
    """
    assert sample_row_by_row is not None
    if not generators:
        return sample_row_by_row(probs_BV, generators, *options)
    if len(generators) < len(probs_BV):
        return _sample_apart(probs_BV, generators, *options)
    in_order = [generators[row] for row in range(len(probs_BV))]
    offsets = [generator.get_offset() for generator in in_order]
    for generator, offset in zip(in_order, offsets, strict=True):
        generator.set_offset(offset + OFFSET_PER_TOKEN)
    seeds = np.array([generator.initial_seed() for generator in in_order], np.uint64)
    numbers_B = torch.from_numpy(uniform(seeds, np.array(offsets) // OFFSET_PER_TOKEN))
    if probs_BV.is_cuda:
        numbers_B = numbers_B.pin_memory()
    return sample(probs_BV, numbers_B.to(probs_BV.device, non_blocking=True))


def _sample_apart(probs_BV: torch.Tensor, generators: dict[int, torch.Generator], *options: object) -> torch.Tensor:
    assert sample_row_by_row is not None
    seeded, others = sorted(generators), [row for row in range(len(probs_BV)) if row not in generators]
    tokens_B = torch.empty(len(probs_BV), dtype=torch.int64, device=probs_BV.device)
    tokens_B[seeded] = sample_at_once(probs_BV[seeded], {place: generators[row] for place, row in enumerate(seeded)})
    tokens_B[others] = sample_row_by_row(probs_BV[others], {}, *options)
    return tokens_B


@contextmanager
def groups_of(layout: Layout) -> Iterator[None]:
    """Have an engine that is built in this block make its groups of the ranks that our layout gives it.

    vLLM numbers the ranks of an engine one after the other and has no option for another order.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:  # vLLM makes and ends a group of its own
        yield
        return
    ranks = sorted(range(dist.get_world_size()), key=lambda rank: (layout.data_rank(rank), layout.tensor_rank(rank)))
    if make_group is None:
        if ranks != sorted(ranks):
            raise EngineError(
                "this vLLM has no parallel_state.init_model_parallel_group, so ranks of an engine are neighbours. Set "
                "rollout.tensor_parallel to 1 or to all ranks of a node"
            )
        logger.warning("this vLLM has no parallel_state.init_model_parallel_group; its own order of ranks is ours, too")
        yield
        return
    make_original = make_group
    # Ranks of an engine on the CPU meet in shared memory under this name, which vLLM makes from the address of the process
    # group and so leaves empty here: two runs on one machine, or a run and what a killed one left behind, would meet too.
    first_pid = torch.tensor([os.getpid()])
    dist.broadcast(first_pid, src=0)
    rendezvous_name = f"hybridflow-{first_pid.item()}"

    def make_group_of_ours(group_ranks: list[list[int]], *args: object, **kwargs: object) -> object:
        os.environ["VLLM_DIST_IDENT"] = rendezvous_name
        return make_original([[ranks[number] for number in group] for group in group_ranks], *args, **kwargs)

    parallel_state.init_model_parallel_group = make_group_of_ours
    try:
        yield
    finally:
        parallel_state.init_model_parallel_group = make_group
    dist.barrier()
    for memory in SHARED_MEMORY.glob(f"{rendezvous_name}-*"):  # all have opened it; vLLM leaves it behind at the end
        memory.unlink(missing_ok=True)


def partial_outputs(engine: LLMEngine) -> list[RequestOutput]:
    """What vLLM would answer to each unfinished request if it were aborted now; none where a release has this elsewhere."""
    try:
        from vllm.v1.engine import FinishReason

        states = engine.output_processor.request_states.values()
        return [state.make_request_output([], None, FinishReason.ABORT, None) for state in states]
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("this vLLM does not give out tokens of unfinished requests, which start again: %s", error)
        return []


def keep_process_groups(engine: LLMEngine) -> None:
    """Call off what vLLM (seen in 0.32) does when an engine is collected or Python ends: it destroys the process groups of the
    whole process, training's and those of another engine with them."""
    finalizer = vars(engine.engine_core).get("_finalizer")
    if isinstance(finalizer, weakref.finalize):
        finalizer.detach()


def silence_internals() -> None:
    """Keep from the console what tells our users nothing; whoever asks for another level of vLLM's log gets it all."""
    if os.environ["VLLM_LOGGING_LEVEL"] != "WARNING":
        return
    for name in SPEAK_OF_INTERNALS:
        logging.getLogger(f"vllm.{name}").addFilter(_is_error)  # levels do not survive that vLLM 0.32 starts its log anew
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def quieten() -> None:
    """Hold vLLM to its level of logging, which some releases read when they are imported and others when they start."""
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # At every reload it reports the layers that have no weights as failed; load_weights looks for missing ones itself.
    logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)


RowRange = tuple[int, int]
WeightPart = tuple[str, torch.nn.Module, RowRange]


def weight_parts(model: torch.nn.Module) -> Iterator[WeightPart]:
    """Every weight of this rank under its Hugging Face name, with the module that holds it and its rows in the parameter.

    vLLM stacks what shares an input: rows of qkv_proj are q_proj, k_proj, v_proj. Its vocabulary is padded. A tied weight
    comes once, under its first name.
    """
    stacked: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        prefix, _, own_name = module_name.rpartition(".")
        prefix = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, VocabParallelEmbedding):
                yield f"{module_name}.{name}", module, (0, module.shard_indices.num_org_elements)
            elif own_name in stacked and isinstance(module, LinearBase):
                ends = np.cumsum([0, *module.output_partition_sizes]).tolist()
                for part, first, last in zip(stacked[own_name], ends[:-1], ends[1:], strict=True):
                    yield f"{prefix}{part}.{name}", module, (first, last)
            else:
                yield f"{module_name}.{name}", module, (0, _num_rows(module, parameter))


def _num_rows(module: torch.nn.Module, parameter: torch.nn.Parameter) -> int:
    return sum(module.output_partition_sizes) if isinstance(module, LinearBase) else parameter.shape[0]


def _heads(model: torch.nn.Module) -> dict[int, ParallelLMHead]:
    """Output layers by the identity of their weight, which with tied embeddings is the embedding's."""
    return {id(head.weight): head for head in model.modules() if isinstance(head, ParallelLMHead)}


def pack_heads(model: torch.nn.Module) -> None:
    """Have output layers pack their weights again: vLLM's reload on CPU packs only layers that it is given weights for, so
    with tied embeddings (seen in 0.32) the output layer would go on with the old ones."""
    for head in _heads(model).values():
        head.quant_method.process_weights_after_loading(head)


def pack_experts_at_reload(model: torch.nn.Module) -> None:
    """Have mixtures of experts make their kernels at the coming reload: vLLM (seen in 0.32, CPU) packs the weights of experts
    only when it makes a kernel, and would compute with unpacked ones after every reload."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if FusedMoEMethod is not None and isinstance(method, FusedMoEMethod):
            method.moe_kernel = None


@torch.no_grad()
def held_weights(model: torch.nn.Module, parts: Sequence[WeightPart], spec: EngineSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of parts, as the engine computes with them, but for those that cannot be read back."""
    heads = _heads(model) if spec.device.type == "cpu" else {}
    for name, module, (first, last) in parts:
        held: torch.Tensor | None = module.get_parameter(name.rpartition(".")[2])
        layer = heads.get(id(held), module)  # a tied weight is also packed for the output, the copy that may be stale
        if spec.device.type == "cpu" and name.endswith(".weight") and isinstance(layer, LinearBase | ParallelLMHead):
            held = _read_back(layer, spec.torch_dtype)
        if held is not None:
            yield name, held[first:last]


def _read_back(module: LinearBase | ParallelLMHead, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight [out, in] that a layer computes with, by giving it the identity; None where that would take long.

    Every product has one term that is not zero, so the numbers come back exactly.
    """
    if isinstance(module, LinearBase):
        # A layer that is not sharded over ranks has no size of its part.
        num_in = vars(module).get("input_size_per_partition", module.input_size)
        num_out = sum(module.output_partition_sizes)
    else:
        num_in, num_out = module.embedding_dim, module.num_embeddings_per_partition
    if num_in * num_out > MOST_ELEMENTS_READ_BACK:
        return None
    found: torch.Tensor = module.quant_method.apply(module, torch.eye(num_in, dtype=dtype), bias=None)
    return found.t()
