"""Several decode steps of vLLM for one round of its scheduler.

vLLM decides before every token which requests run and what memory they get, and afterwards looks at every token, all in Python:
for a model of 0.5B and 512 requests, three times as long as the GPU computes. While the same requests decode and nothing
arrives, the next step is the last one with each request a token further; so memory is taken for several tokens, steps are
repeated, and their tokens are handed to vLLM together. Requests that end meanwhile compute a few tokens in vain.

Written for 0.24 and 0.32, through `scheduler_cls` of vLLM's engine. A step with anything unknown in it is not repeated.
"""

from __future__ import annotations

import dataclasses
from itertools import chain
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

STEPS_OF_A_ROUND = 8
"""One that is scheduled and its repetitions. A response that ends early computes half as many tokens in vain, on average."""
REPEATED_FIELDS = {"num_scheduled_tokens", "total_num_scheduled_tokens", "num_common_prefix_blocks"}
MOVED_FIELDS = {"scheduled_cached_reqs", "finished_req_ids"}
Outputs = dict[int, Any]
"""Of each client; there is one here."""


class RoundScheduler(AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler with repeated decode steps."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        self.can_repeat = (
            self.num_spec_tokens == 0
            and self.connector is None
            and all(type(group.kv_cache_spec) is FullAttentionSpec for group in groups)
        )
        if self.can_repeat:
            self.num_lookahead_tokens += STEPS_OF_A_ROUND - 1
        self.step: SchedulerOutput | None = None
        """The last one."""
        self.repetitions_left = 0
        self.queues: tuple[int, ...] = ()
        self.held: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []
        """Steps that the model has done and vLLM's scheduler not seen, oldest first."""

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The next step: the last one with each request a token further, or what vLLM decides."""
        if self.repetitions_left and self.queues == self._queues():
            assert self.step is not None
            self.step = _a_token_further(self.step)
            self.repetitions_left -= 1
            self._update_after_schedule(self.step)
        else:
            self.step = super().schedule(*args, **kwargs)
            self.repetitions_left = self._num_repetitions(self.step)
            self.queues = self._queues()
        return self.step

    def _queues(self) -> tuple[int, ...]:
        """Lengths, which change where a request arrives, ends or is sent back."""
        return len(self.running), len(self.waiting)

    def _num_repetitions(self, step: SchedulerOutput) -> int:
        """How often a step can be repeated: memory and length of the model suffice, and at least one request needs it."""
        if not self.can_repeat or not _is_decode(step):
            return 0
        requests = [self.requests[name] for name in step.num_scheduled_tokens]
        if any(request.is_prefill_chunk or request.sampling_params.stop for request in requests):
            return 0  # a stop string is found in the text, where tokens after it would stay
        room: int = min(self.max_model_len - 1 - request.num_computed_tokens for request in requests)
        needed: int = max(
            request.num_prompt_tokens + request.max_tokens - 1 - request.num_computed_tokens for request in requests
        )
        return max(0, min(STEPS_OF_A_ROUND - 1, room, needed))

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Outputs:
        """What a step gave; nothing until the last one of its round is scheduled."""
        self.held.append((scheduler_output, model_runner_output))
        if self.repetitions_left and self.step is not None and _is_same_round(self.held[0][0], self.step):
            return {}
        held, self.held = self.held, []
        outputs: Outputs = {}
        for step, result in _joined(held):
            for client, found in super().update_from_output(step, result).items():
                if client in outputs:
                    outputs[client].outputs = [*outputs[client].outputs, *found.outputs]
                else:
                    outputs[client] = found
        return outputs


def _is_same_round(step: SchedulerOutput, other: SchedulerOutput) -> bool:
    """Repetitions share the very table of what is scheduled."""
    return step.num_scheduled_tokens is other.num_scheduled_tokens


def _is_decode(step: SchedulerOutput) -> bool:
    """Whether the step does nothing but compute one token for requests that the model runner knows."""
    if step.total_num_scheduled_tokens != len(step.num_scheduled_tokens) or step.scheduled_cached_reqs.resumed_req_ids:
        return False
    others = {field.name for field in dataclasses.fields(step)} - REPEATED_FIELDS - MOVED_FIELDS
    return bool(step.num_scheduled_tokens) and not any(getattr(step, name) for name in others)


def _a_token_further(step: SchedulerOutput) -> SchedulerOutput:
    known = step.scheduled_cached_reqs
    moved = dataclasses.replace(
        known,
        all_token_ids={},
        new_block_ids=[None] * len(known.req_ids),
        num_computed_tokens=[number + 1 for number in known.num_computed_tokens],
        num_output_tokens=[number + 1 for number in known.num_output_tokens],
    )
    return dataclasses.replace(step, scheduled_cached_reqs=moved, finished_req_ids=set())


def _joined(
    steps: list[tuple[SchedulerOutput, ModelRunnerOutput]],
) -> list[tuple[SchedulerOutput, ModelRunnerOutput]]:
    """Steps of one round as one with several tokens of each request, B requests and S steps, as vLLM knows it of speculative
    decoding; as they are where a step differs from the others."""
    results = [result for _, result in steps]
    step, last = steps[-1]
    num_steps, num_requests = len(steps), len(last.req_ids)
    is_regular = all(
        _is_same_round(other, step)
        and result.req_ids == last.req_ids
        and all(len(tokens) == 1 for tokens in result.sampled_token_ids)
        and len(result.sampled_token_ids) == num_requests
        and (result.logprobs is None) == (last.logprobs is None)
        for other, result in steps
    )
    if num_steps == 1 or not is_regular:
        return steps
    tokens_BS = [list(chain(*tokens)) for tokens in zip(*(result.sampled_token_ids for result in results), strict=True)]
    scheduled = dict.fromkeys(step.num_scheduled_tokens, num_steps)
    return [
        (
            dataclasses.replace(step, num_scheduled_tokens=scheduled, total_num_scheduled_tokens=num_steps * num_requests),
            dataclasses.replace(last, sampled_token_ids=tokens_BS, logprobs=_joined_log_probs(results)),
        )
    ]


def _joined_log_probs(results: list[ModelRunnerOutput]) -> LogprobsLists | None:
    """Rows [B * S, ...] of all steps, those of a request side by side."""
    parts = [result.logprobs for result in results if result.logprobs is not None]
    if not parts:
        return None
    num_requests = len(results[0].req_ids)
    columns = [
        np.stack([column[:num_requests] for column in same], axis=1) for same in zip(*(part[:3] for part in parts), strict=True)
    ]
    flat = [column.reshape(num_requests * len(parts), *column.shape[2:]) for column in columns]
    return LogprobsLists(*flat, [number * len(parts) for number in range(num_requests)])
