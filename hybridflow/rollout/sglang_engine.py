"""Generation with SGLang through its public `Engine`: the only file that imports sglang.

SGLang computes in processes of its own, which it starts. Its log-probabilities are those after temperature and before
the filters, as our contract wants them, unless SGLANG_RETURN_ORIGINAL_LOGPROB is set.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import sglang
import torch

from hybridflow.data.chat import tokenizer_at
from hybridflow.errors import EngineError
from hybridflow.rollout.base import Engine, EngineSpec, FinishReason, Request, Response
from hybridflow.rollout.expected_weights import ExpectedWeights
from hybridflow.rollout.stopping import end_of_sequence_ids

logger = logging.getLogger("hybridflow")

BYTES_PER_UPDATE = 512 << 20
"""Weights that are handed over in one call."""
RESERVED_TOKENS = 2
"""Of the context, which SGLang keeps free behind prompt and response."""
FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
WAIT_BETWEEN_ABORTS_S = 0.2


Output = Mapping[str, Any]
"""A response as SGLang gives it: `meta_info` with `finish_reason` and, unless it was aborted before its first token, a list
`output_token_logprobs` of (log-probability, token, its text)."""


class SglangEngine(Engine):
    """One SGLang engine for each data rank."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        assert spec.layout.tensor == 1, "SGLang runs on one GPU for each rank here; config/rules_engine checks this"
        if os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "").lower() in ("1", "true"):
            raise EngineError(
                "SGLANG_RETURN_ORIGINAL_LOGPROB makes SGLang ignore the temperature in log-probabilities; unset it"
            )
        tokenizer = tokenizer_at(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        self.end_ids = end_of_sequence_ids(spec.model, tokenizer, trust_remote_code=spec.trust_remote_code)
        self.expected_weights = ExpectedWeights(spec.model, trust_remote_code=spec.trust_remote_code)
        logger.info("SGLang: starting its processes and loading %s", spec.model)
        self.engine = sglang.Engine(**_arguments(spec))
        self.running: dict[asyncio.Task[Output], Request] = {}

    def add(self, request: Request) -> None:
        self.check_length(request)
        coroutine = self.engine.async_generate(
            input_ids=np.asarray(request.prompt).tolist(),
            sampling_params=self._parameters(request),
            return_logprob=True,  # the tokens come with it, stop tokens included
        )
        self.running[self.engine.loop.create_task(coroutine)] = request

    def _parameters(self, request: Request) -> dict[str, object]:
        sampling = request.sampling
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "max_new_tokens": sampling.max_tokens,
            "stop": list(sampling.stop),
            "stop_token_ids": [*(() if sampling.ignore_eos else self.end_ids), *sampling.stop_token_ids],
            "ignore_eos": sampling.ignore_eos,
            "no_stop_trim": True,
            **({"sampling_seed": request.seed % 2**63} if self.spec.seed_requests else {}),
        }

    def step(self) -> list[Response]:
        """Wait for the first of the running responses: SGLang's own processes do the steps."""
        if not self.running:
            return []
        finished, _ = self.engine.loop.run_until_complete(asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED))
        return [_response(self.running.pop(task), task.result(), FINISH_REASONS) for task in finished]

    def interrupt(self) -> list[Response]:
        responses: list[Response] = []
        while self.running:  # again, for those that were not yet on their way to SGLang's scheduler
            self.engine.tokenizer_manager.abort_request(abort_all=True)
            finished, _ = self.engine.loop.run_until_complete(asyncio.wait(self.running, timeout=WAIT_BETWEEN_ABORTS_S))
            reasons = FINISH_REASONS | {"abort": "interrupted"}
            responses += [_response(self.running.pop(task), task.result(), reasons) for task in finished]
        return responses

    @property
    def num_unfinished(self) -> int:
        return len(self.running)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.check_idle()
        checked = self.expected_weights.of(weights)
        bucket: list[tuple[str, torch.Tensor]] = []
        for name, tensor in checked:
            bucket.append((name, tensor.clone()))  # the caller's buffer may be gone when the bucket is full
            if sum(part.nbytes for _, part in bucket) >= BYTES_PER_UPDATE:
                self._update(bucket)
                bucket = []
        if bucket:
            self._update(bucket)
        checked.finish()
        if not self.engine.flush_cache().success:
            raise EngineError("SGLang did not forget its cached prefixes, which belong to the old weights")

    def _update(self, bucket: list[tuple[str, torch.Tensor]]) -> None:
        is_done, message = self.engine.update_weights_from_tensor(bucket, flush_cache=False)
        if not is_done:
            raise EngineError(f"SGLang refused weights {bucket[0][0]} to {bucket[-1][0]}: {message}")

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None: they are in another process, which shows them as rounded lists only."""
        return iter(())

    def sleep(self) -> None:
        self.check_idle()
        if self.spec.can_sleep:
            self.engine.flush_cache()
            self.engine.release_memory_occupation(tags=["kv_cache"])

    def wake_up(self) -> None:
        if self.spec.can_sleep:
            self.engine.resume_memory_occupation(tags=["kv_cache"])

    def close(self) -> None:
        for task in self.running:
            task.cancel()
        self.running.clear()
        self.engine.shutdown()


def _arguments(spec: EngineSpec) -> dict[str, object]:
    """What the engine is built with: ours, then the user's options over them."""
    device: Literal["cpu", "cuda"] = "cpu" if spec.device.type == "cpu" else "cuda"
    arguments: dict[str, object] = {
        "model_path": spec.model,
        "tokenizer_path": spec.tokenizer or spec.model,
        "trust_remote_code": spec.trust_remote_code,
        "dtype": spec.dtype,
        "device": device,
        "base_gpu_id": spec.device.index or 0,
        "context_length": spec.max_model_tokens + RESERVED_TOKENS,
        "max_running_requests": spec.max_num_seqs,
        "mem_fraction_static": spec.gpu_memory_utilization,
        "random_seed": spec.seed + spec.layout.data_rank(spec.rank),  # where requests have none, engines must not sample alike
        "disable_cuda_graph": spec.enforce_eager or device == "cpu",
        "enable_memory_saver": spec.can_sleep,
        "enable_deterministic_inference": spec.seed_requests,  # without it SGLang does not heed a request's seed
        "log_level": "warning",
    }
    return arguments | spec.options


def _response(request: Request, output: Output, reasons: Mapping[str, FinishReason]) -> Response:
    meta = output["meta_info"]
    reason = meta["finish_reason"]["type"]
    if reason not in reasons:
        raise EngineError(f"SGLang ended request {request.id} with {meta['finish_reason']!r} and without a response")
    found = meta.get("output_token_logprobs", [])
    log_probs = np.array([log_prob for log_prob, *_ in found], np.float32)
    return Response(
        id=request.id,
        tokens=np.array([token for _, token, *_ in found], np.int32),
        log_probs=log_probs if request.sampling.log_probs else None,
        finish_reason=reasons[reason],
    )
