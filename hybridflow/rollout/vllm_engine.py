"""Generation with vLLM in this process, through its public `LLMEngine`.

Written for 0.24 on CUDA and 0.32 on CPU. What differs between releases is probed, not compared by version. What reaches into
private parts is in vllm_patches.py and vllm_scheduler.py.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # vLLM 0.24 reads it when it is imported
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind

from hybridflow.data.chat import tokenizer_at
from hybridflow.errors import EngineError
from hybridflow.rollout import vllm_patches as patches
from hybridflow.rollout.base import Engine, EngineSpec, FinishReason, Request, Response
from hybridflow.rollout.expected_weights import ExpectedWeights
from hybridflow.rollout.seeds import mixed_seed
from hybridflow.rollout.stopping import end_of_sequence_ids
from hybridflow.rollout.vllm_arguments import REFUSALS, engine_arguments, why_not_started

logger = logging.getLogger("hybridflow")

FINISH_REASONS: dict[str | None, FinishReason] = {"stop": "stop", "length": "length"}
MOST_STEPS_IN_FLIGHT = 4
"""Steps of vLLM that are scheduled and not yet looked at: two with asynchronous scheduling, and one that tells the model runner
what was aborted. A step of an idle engine does nothing."""


class VllmEngine(Engine):
    """One vLLM engine; with `tensor_parallel` over 1 the ranks each hold a part of it and must step it together."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        arguments = engine_arguments(spec)
        tokenizer = tokenizer_at(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        self.end_ids = end_of_sequence_ids(spec.model, tokenizer, trust_remote_code=spec.trust_remote_code)
        self.unfinished: dict[int, Request] = {}
        self.logprobs_mode = str(arguments["logprobs_mode"])
        self.unlisted = "flat_logprobs" in SamplingParams.__struct_fields__
        """Log-probabilities come as flat lists: no object per token."""
        building = "compiling and capturing CUDA graphs: about a minute the first time, 20 s with vLLM's compile cache"
        logger.info("vLLM: loading %s, %s", spec.model, "eager" if arguments["enforce_eager"] else building)
        _prepare_process(spec)
        with _kept_random_state(), patches.groups_of(spec.layout):  # vLLM seeds the generators of the whole process
            try:
                self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            except REFUSALS as error:
                raise EngineError(why_not_started(error, spec)) from error
        patches.quieten()
        patches.keep_process_groups(self.engine)
        self.expected_weights = ExpectedWeights(spec.model, trust_remote_code=spec.trust_remote_code)
        self.model: torch.nn.Module = self.engine.apply_model(_itself)[0]
        self.parts = list(patches.weight_parts(self.model))
        self.can_replay_loads = not spec.can_sleep  # whose weights come back in other memory
        self.heeds_seeds = spec.seed_requests or _seeds_cost_nothing(self.engine)

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
        self.unfinished[request.id] = request

    def _seed_generator(self, first: Request) -> None:
        """Without seeds of requests vLLM samples from the generator of the device, which all of this process share. The first
        of the requests that run together decides, so that neither engines side by side sample alike nor two steps of a run, and
        a resumed run samples as it would have."""
        numbers = (first.seed % 2**63, self.spec.layout.data_rank(self.spec.rank))
        (seed,) = mixed_seed(*(np.array([number]) for number in numbers)).tolist()
        (torch.cuda if self.spec.device.type == "cuda" else torch).manual_seed(seed)

    def _check_log_probs(self, request: Request) -> None:
        sampling = request.sampling
        if not sampling.log_probs or sampling.temperature == 0:
            return
        is_filtered = sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
        if is_filtered and self.logprobs_mode == "processed_logprobs":
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
        responses = self._responses(self.engine.step(), FINISH_REASONS)
        for response in responses:
            del self.unfinished[response.id]
        return responses

    def interrupt(self) -> list[Response]:
        """Tokens that are computed and not yet handed over are lost: those of a step in flight and of repeated decode steps."""
        reasons = FINISH_REASONS | {"abort": "interrupted"}
        partial = {response.id: response for response in self._responses(patches.partial_outputs(self.engine), reasons)}
        responses = [partial.get(request.id) or Response.without_tokens(request) for request in self.unfinished.values()]
        self.engine.abort_request([str(request_id) for request_id in self.unfinished])
        self.unfinished.clear()
        for _ in range(MOST_STEPS_IN_FLIGHT):
            self.engine.step()
        return responses

    def _responses(self, outputs: Iterable[RequestOutput], reasons: Mapping[str | None, FinishReason]) -> list[Response]:
        return [self._response(output, reasons) for output in outputs if output.finished]

    def _response(self, output: RequestOutput, reasons: Mapping[str | None, FinishReason]) -> Response:
        completion = output.outputs[0]
        if completion.finish_reason not in reasons:
            raise EngineError(
                f"vLLM ended request {output.request_id} with {completion.finish_reason!r} and without a response"
            )
        tokens = np.asarray(completion.token_ids, np.int32)
        return Response(
            id=int(output.request_id),
            tokens=tokens,
            log_probs=None if completion.logprobs is None else self._log_probs(completion.logprobs, tokens),
            finish_reason=reasons[completion.finish_reason],
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
        return len(self.unfinished)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.check_idle()
        checked = self.expected_weights.of(weights)
        named = self.expected_weights.checkpoint_names.stream(checked)
        if self.spec.device.type == "cuda":
            self.model.load_weights(named)  # type: ignore[operator]
        else:
            # The CPU kernels have packed the weights, so vLLM builds each layer anew. It keeps what it is given until
            # the layer is complete, longer than the caller's buffers last: hence copies.
            patches.pack_experts_at_reload(self.model)
            copies = ((name, tensor.clone()) for name, tensor in named)
            self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": copies})
            patches.pack_heads(self.model)
        checked.finish()
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> None:
        self.check_idle()
        if not self.engine.reset_prefix_cache():
            raise EngineError("vLLM did not forget its cached prefixes, which belong to the old weights")

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return patches.held_weights(self.model, self.parts, self.spec)

    def sleep(self) -> None:
        self.check_idle()
        if self.spec.can_sleep and self.spec.device.type == "cuda":
            torch.cuda.synchronize()  # one step more than was needed may still compute with this memory
            self.engine.reset_prefix_cache()
            self.engine.sleep(level=1)

    def wake_up(self) -> None:
        if self.spec.can_sleep and self.spec.device.type == "cuda":
            torch.cuda.empty_cache()  # vLLM maps its memory anew, past torch's allocator and what that keeps unused
            self.engine.wake_up()

    def close(self) -> None:
        # Not the engine's own shutdown: it destroys the process groups of the whole process, training's with them.
        self.engine.model_executor.shutdown()


def _prepare_process(spec: EngineSpec) -> None:
    """What vLLM has no arguments for."""
    patches.silence_internals()
    patches.take_second_runner(spec)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights arrive as tensors, requests without a socket
    if dist.is_initialized():
        os.environ["RANK"] = str(dist.get_rank())
        os.environ["LOCAL_RANK"] = str(spec.device.index or 0)
    if importlib.util.find_spec("flashinfer") is None:  # a dependency of vLLM that not every machine has a build of
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    patches.replace_slow_parts(spec.device)


def _seeds_cost_nothing(engine: LLMEngine) -> bool:
    """Whether seeds cost nothing: vLLM's second model runner computes the noise of a token from its seed and position."""
    return bool(getattr(engine.vllm_config, "use_v2_model_runner", False))


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
