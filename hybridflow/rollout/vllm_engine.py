"""Generation with vLLM in this process, through its public `LLMEngine`.

Written for 0.24 on CUDA and 0.32 on CPU. What differs between releases is probed, not compared by version.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # vLLM 0.24 reads it when it is imported
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists
from vllm.v1.sample.ops import topk_topp_sampler

from hybridflow.data.chat import tokenizer_at
from hybridflow.errors import EngineError
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, FinishReason, Request, Response
from hybridflow.rollout.expected_weights import ExpectedWeights
from hybridflow.rollout.sampling import draw, mixed_seed, uniform
from hybridflow.rollout.stopping import end_of_sequence_ids
from hybridflow.rollout.vllm_arguments import REFUSALS, engine_arguments, why_not_started

logger = logging.getLogger("hybridflow")

MOST_ELEMENTS_READ_BACK = 1 << 18
"""Of a weight that the CPU kernels have packed: reading it back is a matrix product, which larger ones are not worth."""
SHARED_MEMORY = Path("/dev/shm")
OFFSET_PER_TOKEN = 4
"""By which a kernel of random numbers moves a generator of CUDA."""
draw_token_by_token: Callable[..., torch.Tensor] | None = getattr(topk_topp_sampler, "random_sample", None)
keep_all_log_probs: Callable[..., None] | None = getattr(LogprobsProcessor, "_update_sample_logprobs", None)
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
FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}


class VllmEngine(Engine):
    """One vLLM engine; with `tensor_parallel` over 1 the ranks each hold a part of it and must step it together."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        arguments = engine_arguments(spec)
        tokenizer = tokenizer_at(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        self.end_ids = end_of_sequence_ids(spec.model, tokenizer, trust_remote_code=spec.trust_remote_code)
        self.logprobs_mode = str(arguments["logprobs_mode"])
        self.unlisted = "flat_logprobs" in SamplingParams.__struct_fields__
        """Log-probabilities come as flat lists: no object per token."""
        building = "compiling and capturing CUDA graphs: about a minute the first time, 20 s with vLLM's compile cache"
        logger.info("vLLM: loading %s, %s", spec.model, "eager" if arguments["enforce_eager"] else building)
        _prepare_process(spec)
        with _kept_random_state(), _groups_of(spec.layout):  # vLLM seeds the generators of the whole process
            try:
                self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            except REFUSALS as error:
                raise EngineError(why_not_started(error, spec)) from error
        _quieten()
        _keep_process_groups(self.engine)
        self.expected_weights = ExpectedWeights(spec.model, trust_remote_code=spec.trust_remote_code)
        self.model: torch.nn.Module = self.engine.apply_model(_itself)[0]
        self.parts = list(_parts(self.model))
        self.can_replay_loads = not spec.can_sleep  # whose weights come back in other memory
        self.heeds_seeds = spec.seed_requests or _draws_at_no_cost(self.engine)

    def add(self, request: Request) -> None:
        self.check_length(request)
        self._check_log_probs(request)
        if not self.heeds_seeds and request.sampling.temperature and not self.num_unfinished:
            self._seed_generator(request)
        prompt = {"prompt_token_ids": np.asarray(request.prompt).tolist()}
        try:
            self.engine.add_request(str(request.id), prompt, self._parameters(request))
        except REFUSALS as error:
            raise EngineError(f"vLLM refuses request {request.id}: {error}") from error

    def _seed_generator(self, first: Request) -> None:
        """Without seeds of requests vLLM draws from the generator of the device, which all of this process share. The first of
        the requests that run together decides, so that neither engines side by side draw alike nor two steps of a run, and a
        resumed run draws as it would have."""
        numbers = (first.seed % 2**63, self.spec.layout.data_rank(self.spec.rank))
        (seed,) = mixed_seed(*(np.array([number]) for number in numbers)).tolist()
        (torch.cuda if self.spec.device.type == "cuda" else torch).manual_seed(seed)

    def _check_log_probs(self, request: Request) -> None:
        sampling = request.sampling
        if not sampling.log_probs or sampling.temperature == 0:
            return
        has_cut = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        if has_cut and self.logprobs_mode == "processed_logprobs":
            raise EngineError(
                "vLLM gives log-probabilities of what top_p, top_k and min_p leave, but training computes them before. Set "
                "rollout.top_p=1, top_k=0 and min_p=0; or, at rollout.temperature=1, "
                "rollout.engine_options.logprobs_mode=raw_logprobs"
            )
        if sampling.temperature != 1 and self.logprobs_mode != "processed_logprobs":
            raise EngineError(
                f"rollout.engine_options.logprobs_mode={self.logprobs_mode} gives log-probabilities at temperature 1, but "
                f"{sampling.temperature} was asked for. Leave the option out, or set rollout.temperature=1"
            )

    def _parameters(self, request: Request) -> SamplingParams:
        sampling = request.sampling
        flat = {"flat_logprobs": True} if self.unlisted else {}
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            seed=request.seed % 2**63 if sampling.temperature and self.heeds_seeds else None,
            stop=list(sampling.stop) or None,
            stop_token_ids=[*(() if sampling.ignore_eos else self.end_ids), *sampling.stop_token_ids],
            ignore_eos=sampling.ignore_eos,
            include_stop_str_in_output=True,
            logprobs=0 if sampling.log_probs else None,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
            **flat,
        )

    def step(self) -> list[Response]:
        return [self._response(output) for output in self.engine.step() if output.finished]

    def _response(self, output: RequestOutput) -> Response:
        completion = output.outputs[0]
        if completion.finish_reason not in FINISH_REASONS:
            raise EngineError(
                f"vLLM ended request {output.request_id} with {completion.finish_reason!r} and without a response"
            )
        tokens = np.asarray(completion.token_ids, np.int32)
        return Response(
            id=int(output.request_id),
            tokens=tokens,
            log_probs=None if completion.logprobs is None else self._log_probs(completion.logprobs, tokens),
            finish_reason=FINISH_REASONS[completion.finish_reason],
            num_cached_tokens=output.num_cached_tokens or 0,
        )

    def _log_probs(self, found: Iterable[object], tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        if self.unlisted:
            flat = np.asarray(found.logprobs, np.float32)  # type: ignore[attr-defined]
            assert len(flat) == len(tokens), f"vLLM gave {len(flat)} log-probabilities for {len(tokens)} tokens"
            return flat
        pairs = zip(found, tokens, strict=True)
        return np.array([at_token[int(token)].logprob for at_token, token in pairs], np.float32)  # type: ignore[index]

    @property
    def num_unfinished(self) -> int:
        return int(self.engine.get_num_unfinished_requests())

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.check_idle()
        checked = self.expected_weights.of(weights)
        if self.spec.device.type == "cuda":
            self.model.load_weights(iter(checked))  # type: ignore[operator]
        else:
            # The CPU kernels have packed the weights, so vLLM builds each layer anew. It keeps what it is given until
            # the layer is complete, longer than the caller's buffers last: hence copies.
            copies = ((name, tensor.clone()) for name, tensor in checked)
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": copies})
            _pack_heads(self.model)
        checked.finish()
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        self.check_idle()
        if not self.engine.reset_prefix_cache():
            raise EngineError("vLLM did not forget its cached prefixes, which belong to the old weights")

    @torch.no_grad()
    def held_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        heads = _heads(self.model)
        for name, module, (first, last) in self.parts:
            tensor: torch.Tensor = module.get_parameter(name.rpartition(".")[2])
            layer = heads.get(id(tensor), module)  # a tied weight is also packed for the output, the copy that may be stale
            if self.spec.device.type == "cpu" and name.endswith(".weight") and isinstance(layer, LinearBase | ParallelLMHead):
                unpacked = _read_back(layer, self.spec.torch_dtype)
                if unpacked is None:
                    continue
                tensor = unpacked
            yield name, tensor[first:last]

    def sleep(self) -> None:
        self.check_idle()
        if self.spec.can_sleep and self.spec.device.type == "cuda":
            torch.cuda.synchronize()  # one step more than was needed may still compute with this memory
            self.engine.reset_prefix_cache()
            self.engine.sleep(level=1)

    def wake(self) -> None:
        if self.spec.can_sleep and self.spec.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM maps its memory anew, past torch's allocator and what that keeps unused
            self.engine.wake_up()

    def close(self) -> None:
        # Not the engine's own shutdown: it destroys the process groups of the whole process, training's with them.
        self.engine.model_executor.shutdown()


def _prepare_process(spec: EngineSpec) -> None:
    """What vLLM has no arguments for."""
    _silence_internals()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights arrive as tensors, requests without a socket
    if dist.is_initialized():
        os.environ["RANK"] = str(dist.get_rank())
        os.environ["LOCAL_RANK"] = str(spec.device.index or 0)
    if importlib.util.find_spec("flashinfer") is None:  # a dependency of vLLM that not every machine has a build of
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if spec.device.type == "cuda" and draw_token_by_token is not None:
        topk_topp_sampler.random_sample = draw_at_once
    if keep_all_log_probs is not None:
        LogprobsProcessor._update_sample_logprobs = keep_chosen_log_probs


def keep_chosen_log_probs(processor: LogprobsProcessor, found: LogprobsLists) -> None:
    """In place of a method of vLLM that also keeps ranks, texts, places and a sum for every token, which nobody reads here: a
    tenth of the time of 512 requests, since generating them is bound by Python. Log-probabilities are [tokens, 1]."""
    is_chosen_only = processor.num_logprobs == 0 and hasattr(processor.logprobs, "logprobs")
    if is_chosen_only:
        processor.logprobs.logprobs.extend(found.logprobs[:, 0].tolist())
    else:
        assert keep_all_log_probs is not None
        keep_all_log_probs(processor, found)


def draw_at_once(probs_BV: torch.Tensor, generators: dict[int, torch.Generator], *options: object) -> torch.Tensor:
    """In place of a function of vLLM's first model runner, which launches a kernel of the whole vocabulary for every request
    that has a seed: a quarter of the time of 512 requests. Shape [B]. Rows without a seed, greedy ones among them, are drawn as
    before.

    A generator only counts its tokens here; where vLLM drops one it winds it back, by as much as a kernel would have moved it.
    """
    assert draw_token_by_token is not None
    if not generators:
        return draw_token_by_token(probs_BV, generators, *options)
    if len(generators) < len(probs_BV):
        return _draw_apart(probs_BV, generators, *options)
    in_order = [generators[row] for row in range(len(probs_BV))]
    offsets = [generator.get_offset() for generator in in_order]
    for generator, offset in zip(in_order, offsets, strict=True):
        generator.set_offset(offset + OFFSET_PER_TOKEN)
    seeds = np.array([generator.initial_seed() for generator in in_order], np.uint64)
    numbers_B = torch.from_numpy(uniform(seeds, np.array(offsets) // OFFSET_PER_TOKEN))
    if probs_BV.is_cuda:
        numbers_B = numbers_B.pin_memory()
    return draw(probs_BV, numbers_B.to(probs_BV.device, non_blocking=True))


def _draw_apart(probs_BV: torch.Tensor, generators: dict[int, torch.Generator], *options: object) -> torch.Tensor:
    assert draw_token_by_token is not None
    seeded, others = sorted(generators), [row for row in range(len(probs_BV)) if row not in generators]
    tokens_B = torch.empty(len(probs_BV), dtype=torch.int64, device=probs_BV.device)
    tokens_B[seeded] = draw_at_once(probs_BV[seeded], {place: generators[row] for place, row in enumerate(seeded)})
    tokens_B[others] = draw_token_by_token(probs_BV[others], {}, *options)
    return tokens_B


def _draws_at_no_cost(engine: LLMEngine) -> bool:
    """Whether seeds cost nothing: vLLM's second model runner computes the noise of a token from its seed and position."""
    return bool(getattr(engine.vllm_config, "use_v2_model_runner", False))


@contextmanager
def _groups_of(layout: Layout) -> Iterator[None]:
    """Have an engine that is built in this block make its groups of the ranks that our layout gives it.

    vLLM numbers the ranks of an engine one after the other and has no option for another order.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:  # vLLM makes and ends a group of its own
        yield
        return
    make_group = parallel_state.init_model_parallel_group
    ranks = sorted(range(dist.get_world_size()), key=lambda rank: (layout.data_rank(rank), layout.tensor_rank(rank)))
    # Ranks of an engine on the CPU meet in shared memory under this name, which vLLM makes from the address of the process
    # group and so leaves empty here: two runs on one machine, or a run and what a killed one left behind, would meet too.
    first_pid = torch.tensor([os.getpid()])
    dist.broadcast(first_pid, src=0)
    meeting_name = f"hybridflow-{first_pid.item()}"

    def make_group_of_ours(group_ranks: list[list[int]], *args: object, **kwargs: object) -> object:
        os.environ["VLLM_DIST_IDENT"] = meeting_name
        return make_group([[ranks[number] for number in group] for group in group_ranks], *args, **kwargs)

    parallel_state.init_model_parallel_group = make_group_of_ours
    try:
        yield
    finally:
        parallel_state.init_model_parallel_group = make_group
    dist.barrier()
    for memory in SHARED_MEMORY.glob(f"{meeting_name}-*"):  # all have opened it; vLLM leaves it behind at the end
        memory.unlink(missing_ok=True)


def _keep_process_groups(engine: LLMEngine) -> None:
    """Call off what vLLM (seen in 0.32) does when an engine is collected or Python ends: it destroys the process groups of the
    whole process, training's and those of another engine with them."""
    finalizer = vars(engine.engine_core).get("_finalizer")
    if isinstance(finalizer, weakref.finalize):
        finalizer.detach()


def _silence_internals() -> None:
    """Keep from the console what tells our users nothing; whoever asks for another level of vLLM's log gets it all."""
    if os.environ["VLLM_LOGGING_LEVEL"] != "WARNING":
        return
    for name in SPEAK_OF_INTERNALS:
        logging.getLogger(f"vllm.{name}").addFilter(_is_error)  # levels do not survive that vLLM 0.32 starts its log anew
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _quieten() -> None:
    """Hold vLLM to its level of logging, which some releases read when they are imported and others when they start."""
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # At every reload it reports the layers that have no weights as failed; load_weights looks for missing ones itself.
    logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)


@contextmanager
def _kept_random_state() -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _itself(model: torch.nn.Module) -> torch.nn.Module:
    return model


Rows = tuple[int, int]
Part = tuple[str, torch.nn.Module, Rows]


def _parts(model: torch.nn.Module) -> Iterator[Part]:
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


def _pack_heads(model: torch.nn.Module) -> None:
    """Have output layers pack their weights again: vLLM's reload on CPU packs only layers that it is given weights for, so
    with tied embeddings (seen in 0.32) the output layer would go on with the old ones."""
    for head in _heads(model).values():
        head.quant_method.process_weights_after_loading(head)


def _read_back(module: LinearBase | ParallelLMHead, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight [out, in] that a layer computes with, by giving it the identity; None where that would take long.

    Every product has one term that is not zero, so the numbers come back exactly.
    """
    if isinstance(module, LinearBase):
        num_in, num_out = module.input_size_per_partition, sum(module.output_partition_sizes)
    else:
        num_in, num_out = module.embedding_dim, module.num_embeddings_per_partition
    if num_in * num_out > MOST_ELEMENTS_READ_BACK:
        return None
    found: torch.Tensor = module.quant_method.apply(module, torch.eye(num_in, dtype=dtype), bias=None)
    return found.t()
