"""Multi-step scheduling: several decode steps of vLLM for one run of its scheduler.

vLLM decides before every token which requests run and what memory they get, and afterwards looks at every token, all in Python:
for a model of 0.5B and 512 requests, three times as long as the GPU computes. While the same requests decode and nothing
arrives, the next step is the last one with each request a token further; so where memory is there for several tokens, steps are
repeated, and their tokens are handed to vLLM together, before it decides again. Requests that end meanwhile compute a few
tokens in vain.

Written for 0.24 and 0.32, through `scheduler_cls` of vLLM's engine. A step with anything unknown in it is not repeated.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from itertools import chain
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request

logger = logging.getLogger("hybridflow")

REPEATED_FIELDS = {"num_scheduled_tokens", "total_num_scheduled_tokens", "num_common_prefix_blocks"}
"""Of a step, what its repetitions have too."""
MOVED_FIELDS = {"scheduled_cached_reqs", "finished_req_ids"}
"""What they have otherwise. All other fields must be empty in a step that is repeated."""
JOINED_FIELDS = {"req_ids", "req_id_to_index", "sampled_token_ids", "logprobs", "prompt_logprobs_dict"}
"""Of a result, what is understood. All other fields must be empty in results that are joined."""
ExecutedStep = tuple[SchedulerOutput, ModelRunnerOutput]
"""One that the model has done, and its result."""


class _TokensAtOnce(Scheduler):  # type: ignore[misc]
    """Tokens of several steps that cannot end their request are appended together; vLLM would look at each in Python."""

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        if len(new_token_ids) > 1 and not self._can_end(request, new_token_ids):
            request.append_output_token_ids(new_token_ids)
            return new_token_ids, False
        found: tuple[list[int], bool] = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        return found

    def _can_end(self, request: Request, tokens: list[int]) -> bool:
        asked = request.sampling_params
        if asked is None or asked.repetition_detection is not None:
            return True
        ends = (asked.eos_token_id, *(asked.stop_token_ids or ()))
        return (
            request.num_tokens + len(tokens) >= self.max_model_len
            or request.num_output_tokens + len(tokens) >= request.max_tokens
            or any(end in tokens for end in ends)
        )


class MultiStepScheduler(AsyncScheduler, _TokensAtOnce):  # type: ignore[misc]
    """vLLM's scheduler with repeated decode steps."""

    max_steps = 32
    """One that is scheduled and its repetitions, at most."""
    tokens_per_repetition = 2
    """That requests must have said on average: short responses would compute much in vain."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        self.can_repeat = (
            self.num_spec_tokens == 0
            and self.connector is None
            and not self.use_pp
            and all(type(group.kv_cache_spec) is FullAttentionSpec for group in groups)
        )
        self.step: SchedulerOutput | None = None
        """The last one."""
        self.repetitions_left = 0
        self.repeated: list[Request] = []
        """The requests of a step that is repeated."""
        self.counters: tuple[str, ...] | None = None
        """What vLLM counts up by one in each request of a repeated step; none where it changes more than that."""
        self.state: tuple[object, ...] = ()
        self.num_awaited = 0
        """Steps whose results have not come: with asynchronous scheduling the last one is under way."""
        self.held: list[ExecutedStep] = []
        """What vLLM's scheduler has not seen, oldest first."""
        self.num_preemptions = 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """The next step: the last one with each request a token further; an empty one, by which vLLM comes to look at what
        repetitions gave, so that it decides once after them and not before and after the last of their results; or what it
        decides."""
        if self.step is not None and self.repetitions_left and not self.finished_req_ids and self.state == self._state():
            self.step = _a_token_further(self.step)
            self.repetitions_left -= 1
            self.num_awaited += 1
            self._count_repetition(self.step)
            return self.step
        self.repetitions_left = 0
        # The first model runner takes an empty step for the end of all that run, and would build its batch anew.
        if self.held and self.num_awaited and self.use_v2_model_runner:
            return SchedulerOutput.make_empty()
        has_room = self.can_repeat and self._has_room()
        if self.can_repeat:
            self.num_lookahead_tokens = self.max_steps - 1 if has_room else 0
        self.step = super().schedule(*args, **kwargs)
        self.repetitions_left = self._num_repetitions(self.step) if has_room else 0
        self.repeated = [self.requests[name] for name in self.step.num_scheduled_tokens] if self.repetitions_left else []
        self.state = self._state()
        self.num_awaited += bool(self.step.total_num_scheduled_tokens)
        return self.step

    def _count_repetition(self, step: SchedulerOutput) -> None:
        """As vLLM's own `_update_after_schedule`, which at the first repetition shows what it changes in a request (two
        counters in 0.24, three in 0.32), and is called for every one where that is more."""
        if self.counters:
            for request in self.repeated:
                for name in self.counters:
                    setattr(request, name, getattr(request, name) + 1)
            return
        state = vars(self.repeated[0])
        before = dict(state)
        self._update_after_schedule(step)
        if self.counters is None:
            changed = tuple(
                name for name, value in state.items() if value is not before.get(name) and value != before.get(name)
            )
            is_counted = all(type(state[name]) is int and state[name] == before.get(name, 0) + 1 for name in changed)
            self.counters = changed if is_counted else ()

    def _preempt_request(self, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(*args, **kwargs)
        self.num_preemptions += 1
        if self.num_preemptions.bit_count() == 1:  # the first one, and where their number has doubled
            logger.warning(
                "vLLM's key-value cache is full: %d requests so far had to wait and be computed again. More memory "
                "(rollout.gpu_memory_utilization, on a CPU rollout.cpu_cache_gib) or a smaller rollout.max_num_seqs avoids it",
                self.num_preemptions,
            )

    def _state(self) -> tuple[object, ...]:
        """What changes where a request arrives, ends or is sent back, or the scheduler is paused."""
        return self.get_request_counts(), self._pause_state

    def _has_room(self) -> bool:
        """Whether memory for all steps is there without taking it from others: else a step at a time, as vLLM does."""
        num_blocks: int = len(self.running) * math.ceil(self.max_steps / self.block_size)
        num_free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return 0 < num_blocks <= num_free

    def _num_repetitions(self, step: SchedulerOutput) -> int:
        """How often a step can be repeated: within the length of the model, and as far as at least one request needs it."""
        if not _is_decode(step):
            return 0
        requests = [self.requests[name] for name in step.num_scheduled_tokens]
        if any(request.is_prefill_chunk or request.sampling_params.stop for request in requests):
            return 0  # a stop string is found in the text, where tokens after it would stay
        num_said: list[int] = [request.num_computed_tokens - request.num_prompt_tokens for request in requests]
        room: int = min(self.max_model_len - 1 - request.num_computed_tokens for request in requests)
        needed: int = max(request.max_tokens - 1 - number for request, number in zip(requests, num_said, strict=True))
        most = min(self.max_steps - 1, sum(num_said) // (self.tokens_per_repetition * len(requests)))
        return max(0, min(most, room, needed))

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """What a step gave; nothing until the last repetition has given its own, or, where no empty step can stand behind
        it, is scheduled."""
        self.num_awaited -= bool(scheduler_output.total_num_scheduled_tokens)
        self.held.append((scheduler_output, model_runner_output))
        is_more_to_come = self.repetitions_left or (self.use_v2_model_runner and self.num_awaited)
        if is_more_to_come and self.step is not None and _is_same_multi_step(self.held[0][0], self.step):
            return {}
        held, self.held = self.held, []
        outputs: dict[int, EngineCoreOutputs] = {}
        for step, result in _joined(held):
            for client, found in super().update_from_output(step, result).items():
                if client in outputs:
                    found.outputs = [*outputs[client].outputs, *found.outputs]
                outputs[client] = found
        return outputs


def _is_same_multi_step(step: SchedulerOutput, other: SchedulerOutput) -> bool:
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


def _joined(steps: list[ExecutedStep]) -> list[ExecutedStep]:
    """A step and its repetitions as one with several tokens of each request, B requests and S steps, as vLLM knows it of
    speculative decoding; as they are where one of them is no repetition or holds something else."""
    step, last = steps[-1]
    num_steps, num_requests = len(steps), len(last.req_ids)
    is_whole = all(
        _is_same_multi_step(other, step) and result.req_ids == last.req_ids and _is_a_token_each(result)
        for other, result in steps
    )
    if num_steps == 1 or not is_whole:
        return steps
    results = [result for _, result in steps]
    tokens_BS = [list(chain(*tokens)) for tokens in zip(*(result.sampled_token_ids for result in results), strict=True)]
    scheduled = dict.fromkeys(step.num_scheduled_tokens, num_steps)
    return [
        (
            dataclasses.replace(step, num_scheduled_tokens=scheduled, total_num_scheduled_tokens=num_steps * num_requests),
            dataclasses.replace(last, sampled_token_ids=tokens_BS, logprobs=_joined_log_probs(results)),
        )
    ]


def _is_a_token_each(result: ModelRunnerOutput) -> bool:
    others = {field.name for field in dataclasses.fields(result)} - JOINED_FIELDS
    return (
        len(result.sampled_token_ids) == len(result.req_ids)
        and all(len(tokens) == 1 for tokens in result.sampled_token_ids)
        and not any(result.prompt_logprobs_dict.values())
        and not any(getattr(result, name) for name in others)
    )


def _joined_log_probs(results: list[ModelRunnerOutput]) -> LogprobsLists | None:
    """Rows [B * S, ...] of all steps, those of a request side by side; None where no request asks for them."""
    parts = [result.logprobs for result in results if result.logprobs is not None]
    if not parts:
        return None
    num_requests, num_steps = len(results[0].req_ids), len(parts)
    columns = [
        np.stack([column[:num_requests] for column in same], axis=1) for same in zip(*(part[:3] for part in parts), strict=True)
    ]
    flat = [column.reshape(num_requests * num_steps, *column.shape[2:]) for column in columns]
    return LogprobsLists(*flat, cu_num_generated_tokens=[number * num_steps for number in range(num_requests)])
