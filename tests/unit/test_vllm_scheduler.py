"""Rounds of decode steps: what vLLM's scheduler hands out with them is what it hands out without, request by request.

A model that is only told positions stands in: its token depends on the request and the position, and it checks what a worker
would read: that positions follow each other and have memory.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.toy import make_tiny_model

pytest.importorskip("vllm", reason="vllm is not installed: rounds of its scheduler are NOT tested on this machine")

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from hybridflow.rollout.vllm_scheduler import STEPS_OF_A_ROUND, RoundScheduler

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]
BLOCK_SIZE = 16
MAX_REQUESTS = 24
MAX_TOKENS_OF_MODEL = 160
END = 7


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    scheduler = SchedulerConfig(
        max_num_seqs=MAX_REQUESTS,
        max_num_batched_tokens=64,
        max_model_len=MAX_TOKENS_OF_MODEL,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=True,
    )
    init_none_hash(sha256)
    folder = make_tiny_model(tmp_path_factory.mktemp("model"))
    model = ModelConfig(model=folder, dtype="float32", max_model_len=MAX_TOKENS_OF_MODEL)
    cache = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=True)
    return VllmConfig(scheduler_config=scheduler, model_config=model, cache_config=cache, device_config=DeviceConfig("cpu"))


def scheduler_of(kind: type[AsyncScheduler], config: VllmConfig, *, num_blocks: int = 1000, **window: int) -> AsyncScheduler:
    spec_class = SlidingWindowSpec if window else FullAttentionSpec
    spec = spec_class(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32, **window)
    config.cache_config.num_gpu_blocks = num_blocks
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
        log_stats=False,
    )


def token_at(name: str, position: int) -> int:
    """What the model says after this many tokens: a pure function, as with seeds; `END` once in 30 positions."""
    number = (int(name) * 7919 + position * 104729) % 999_983
    return END if number % 30 == 0 else 10 + number % 50


@dataclass
class Model:
    """Holds what a worker knows of requests: their tokens computed so far and their memory."""

    computed: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, list[int]] = field(default_factory=dict)
    num_steps: int = 0

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.num_steps += 1
        for new in step.scheduled_new_reqs:
            self.computed[new.req_id], self.blocks[new.req_id] = new.num_computed_tokens, list(new.block_ids[0])
            self.lengths[new.req_id] = len(new.prompt_token_ids)
        known = step.scheduled_cached_reqs
        assert known.num_output_tokens == [self.said.get(name, 0) for name in known.req_ids]
        for name, number, blocks in zip(known.req_ids, known.num_computed_tokens, known.new_block_ids, strict=True):
            if name in known.resumed_req_ids:
                self.computed[name], self.blocks[name] = number, []
            assert self.computed[name] == number, "positions follow each other"
            self.blocks[name] += blocks[0] if blocks else []
        names = list(step.num_scheduled_tokens)
        sampled: list[list[int]] = []
        for name in names:
            self.computed[name] += step.num_scheduled_tokens[name]
            assert self.computed[name] <= MAX_TOKENS_OF_MODEL
            assert self.computed[name] <= BLOCK_SIZE * len(self.blocks[name]), "every position has memory"
            is_prompt_done = self.computed[name] >= self.lengths[name]
            sampled.append([token_at(name, self.computed[name])] if is_prompt_done else [])
            self.said[name] = self.said.get(name, 0) + is_prompt_done
        used = [block for name in names for block in self.blocks[name][self.lengths[name] // BLOCK_SIZE :]]
        assert len(set(used)) == len(used), "no two requests write to the same memory"
        tokens_B1 = np.array([tokens or [0] for tokens in sampled])
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=LogprobsLists(tokens_B1, -tokens_B1.astype(np.float32), tokens_B1[:, 0]),
            prompt_logprobs_dict={},
        )


@dataclass
class Run:
    """What came out: tokens and log-probabilities by request, why it ended."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    log_probs: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 0


def request(name: int, *, prompt_tokens: int, max_tokens: int, ends: bool = True, **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[END] if ends else [], logprobs=0, **sampling)
    return Request(
        request_id=str(name),
        prompt_token_ids=[name % 50] * prompt_tokens,
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def run(scheduler: AsyncScheduler, arrivals: dict[int, list[Request]], aborts: dict[int, str], *, depth: int) -> Run:
    """As vLLM's engine does: `depth` steps are under way (2: the next one is scheduled while one runs)."""
    model, found, under_way = Model(), Run(), deque[tuple[SchedulerOutput, ModelRunnerOutput]]()
    number = 0
    while number <= max(arrivals) or scheduler.has_requests() or under_way:
        for arriving in arrivals.get(number, []):
            scheduler.add_request(arriving)
        if number in aborts:
            scheduler.finish_requests(aborts[number], RequestStatus.FINISHED_ABORTED)
        number += 1
        assert number < 5000
        if scheduler.has_requests():
            step = scheduler.schedule()
            if step.total_num_scheduled_tokens:
                under_way.append((step, model.run(step)))
        if under_way and (len(under_way) == depth or not scheduler.has_requests() or not step.total_num_scheduled_tokens):
            for outputs in scheduler.update_from_output(*under_way.popleft()).values():
                for output in outputs.outputs:
                    name = output.request_id
                    assert name not in found.reasons, "nothing comes after the end"
                    found.tokens.setdefault(name, []).extend(output.new_token_ids)
                    found.log_probs.setdefault(name, []).extend(output.new_logprobs.logprobs[:, 0].tolist())
                    if output.finish_reason is not None:
                        found.reasons[name] = (output.finish_reason, output.stop_reason)
    found.num_steps = model.num_steps
    return found


def expected(arrivals: dict[int, list[Request]]) -> dict[str, list[int]]:
    """What each request gets by itself."""
    responses = {}
    for arriving in (one for several in arrivals.values() for one in several):
        tokens: list[int] = []
        most = min(arriving.max_tokens, MAX_TOKENS_OF_MODEL - arriving.num_prompt_tokens)
        while len(tokens) < most and tokens[-1:] != [END]:
            tokens.append(token_at(arriving.request_id, arriving.num_prompt_tokens + len(tokens)))
        responses[arriving.request_id] = tokens
    return responses


def some_requests(seed: int, count: int = 80) -> dict[int, list[Request]]:
    """Of all lengths, arriving in the first hundred steps."""
    rng = np.random.default_rng(seed)
    arrivals: dict[int, list[Request]] = {}
    for name in range(count):
        one = request(name, prompt_tokens=int(rng.integers(1, 130)), max_tokens=int(rng.integers(1, 60)))
        arrivals.setdefault(int(rng.integers(0, 100)) if name % 2 else 0, []).append(one)
    return arrivals


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [1000, 60])
@pytest.mark.parametrize("tokens_of_a_step", [64, MAX_REQUESTS])
def test_requests_get_their_tokens_with_and_without_rounds(
    config: VllmConfig, depth: int, num_blocks: int, tokens_of_a_step: int
) -> None:
    """Also where memory is short, so that requests are preempted, and where prompts come in chunks of single tokens."""
    config.scheduler_config.max_num_batched_tokens = tokens_of_a_step
    for seed in range(4):
        found = run(scheduler_of(RoundScheduler, config, num_blocks=num_blocks), some_requests(seed), {}, depth=depth)
        assert found.tokens == expected(some_requests(seed))
        assert found.log_probs == {name: [-float(token) for token in tokens] for name, tokens in found.tokens.items()}
        plain = run(scheduler_of(AsyncScheduler, config, num_blocks=num_blocks), some_requests(seed), {}, depth=depth)
        assert found.reasons == plain.reasons


def count_of_schedules(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with every round of vLLM's own scheduler."""
    calls: list[None] = []
    own = AsyncScheduler.schedule
    monkeypatch.setattr(
        AsyncScheduler, "schedule", lambda self, *args, **kwargs: calls.append(None) or own(self, *args, **kwargs)
    )
    return calls


def test_a_round_is_scheduled_once(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_of_schedules(monkeypatch)
    long = {0: [request(name, prompt_tokens=10, max_tokens=100, ends=False) for name in (1, 2, 3)]}
    found = run(scheduler_of(RoundScheduler, config), long, {}, depth=2)
    assert [len(tokens) for tokens in found.tokens.values()] == [100] * 3
    assert found.num_steps <= 102, "no step in vain where all end together"
    assert len(calls) <= found.num_steps // STEPS_OF_A_ROUND + 5


def test_aborted_requests_end_and_the_others_go_on(config: VllmConfig) -> None:
    for seed in range(4):
        arrivals = some_requests(seed)
        aborts = {13 + 5 * number: str(4 * number) for number in range(12)}
        for depth in (1, 2):
            found = run(scheduler_of(RoundScheduler, config), some_requests(seed), aborts, depth=depth)
            responses = expected(arrivals)
            for name, tokens in responses.items():
                if name in aborts.values():
                    assert found.tokens.get(name, []) == tokens[: len(found.tokens.get(name, []))]
                else:
                    assert found.tokens[name] == tokens


def test_prompts_in_chunks_of_one_token_are_no_decoding(config: VllmConfig) -> None:
    config.scheduler_config.max_num_batched_tokens = MAX_REQUESTS
    scheduler = scheduler_of(RoundScheduler, config)
    others = [request(name, prompt_tokens=1, max_tokens=90, ends=False) for name in range(1, MAX_REQUESTS)]
    arrivals = {0: others, 2: [request(999, prompt_tokens=40, max_tokens=10)]}
    found = run(scheduler, arrivals, {}, depth=2)
    assert found.tokens["999"] == expected({0: arrivals[2]})["999"]
    assert [len(found.tokens[one.request_id]) for one in others] == [90] * len(others)


def test_requests_that_arrive_within_a_round_do_not_wait_for_its_end(config: VllmConfig) -> None:
    config.scheduler_config.max_num_batched_tokens = 64
    scheduler = scheduler_of(RoundScheduler, config)
    scheduler.add_request(request(1, prompt_tokens=10, max_tokens=100))
    steps = [scheduler.schedule() for _ in range(4)]
    assert [len(step.scheduled_new_reqs) for step in steps] == [1, 0, 0, 0]
    assert steps[3].num_scheduled_tokens is steps[1].num_scheduled_tokens, "within a round"
    scheduler.add_request(request(2, prompt_tokens=10, max_tokens=100))
    assert scheduler.schedule().num_scheduled_tokens == {"1": 1, "2": 10}


@pytest.mark.parametrize("what", ["stop strings", "sliding window"])
def test_what_rounds_would_break_goes_step_by_step(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    calls = count_of_schedules(monkeypatch)
    sampling = {"stop": ["so"], "detokenize": True} if what == "stop strings" else {}
    window = {"sliding_window": 64} if what == "sliding window" else {}
    asked = {0: [request(name, prompt_tokens=10, max_tokens=50, **sampling) for name in (1, 2, 3)]}
    found = run(scheduler_of(RoundScheduler, config, **window), asked, {}, depth=2)
    assert found.tokens == expected(asked)
    assert len(calls) >= found.num_steps
