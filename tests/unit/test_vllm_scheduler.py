"""Multi-step scheduling: what vLLM's scheduler hands out with it is what it hands out without, request by request.

A worker stands in whose token depends on all tokens before it, and which checks what it is told: tokens that resumed requests
have said, positions, and that memory holds what was computed of these very tokens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tests.toy import make_tiny_model

pytest.importorskip("vllm", reason="vllm is not installed: multi-step scheduling is NOT tested on this machine")

from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from hybridflow.rollout.vllm_scheduler import MultiStepScheduler

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]
BLOCK_SIZE = 16
MAX_REQUESTS = 24
MAX_TOKENS_OF_MODEL = 160
END = 7


@pytest.fixture(autouse=True)
def many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon after the start, since responses are short here."""
    monkeypatch.setattr(MultiStepScheduler, "tokens_per_repetition", 1)


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


def further(state: int, token: int) -> int:
    """What is known after one token more: a pure function of all tokens so far, as keys and values are."""
    return (state * 1_000_003 + token * 7919 + 12345) % (2**61 - 1)


def token_after(state: int) -> int:
    """What the model says: `END` once in 40 times."""
    number = (state >> 7) % 1000
    return END if number % 40 == 0 else 10 + number % 50


@dataclass
class Model:
    """A worker of vLLM's first or second model runner: holds tokens of requests, and what is written to memory."""

    is_second: bool = False
    tokens: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    """Of prompts."""
    blocks: dict[str, list[int]] = field(default_factory=dict)
    memory: dict[tuple[int, int], int] = field(default_factory=dict)
    """Of block and place: the state after the token there."""
    in_last_step: set[str] = field(default_factory=set)
    num_steps: int = 0
    num_rows: int = 0
    """Of all steps."""

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.num_steps += bool(step.num_scheduled_tokens)
        for name in step.finished_req_ids | ((step.preempted_req_ids or set()) if self.is_second else set()):
            self.tokens.pop(name, None)
        starts = {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
        for new in step.scheduled_new_reqs:
            assert new.req_id not in self.tokens, "the worker hears of the end of every request"
            self.tokens[new.req_id] = list(new.prefill_token_ids if self.is_second else new.prompt_token_ids)
            self.lengths[new.req_id], self.blocks[new.req_id] = len(new.prompt_token_ids), list(new.block_ids[0])
        known = step.scheduled_cached_reqs
        for place, name in enumerate(known.req_ids):
            starts[name] = known.num_computed_tokens[place]
            blocks = known.new_block_ids[place]
            self.blocks[name] = [*([] if name in known.resumed_req_ids else self.blocks[name]), *(blocks[0] if blocks else [])]
            num_said = len(self.tokens[name]) - self.lengths[name]
            assert self.is_second or known.num_output_tokens[place] == num_said
            if not self.is_second and name not in self.in_last_step and num_said:
                assert known.all_token_ids[name][-num_said:] == self.tokens[name][-num_said:], "what a resumed request has said"
        names = list(step.num_scheduled_tokens)
        self.in_last_step = set(names)
        self.num_rows += len(names)
        sampled = [self.compute(name, starts[name], starts[name] + step.num_scheduled_tokens[name]) for name in names]
        tokens_B1 = np.array([tokens or [0] for tokens in sampled]).reshape(len(names), 1)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            logprobs=LogprobsLists(tokens_B1, -tokens_B1.astype(np.float32), tokens_B1[:, 0]),
            prompt_logprobs_dict={},
        )

    def compute(self, name: str, start: int, end: int) -> list[int]:
        """The token after the last one that is known, if computed up to there."""
        tokens, state = self.tokens[name], 1
        assert end <= min(len(tokens), MAX_TOKENS_OF_MODEL)
        for position in range(end):
            state = further(state, tokens[position])
            place = self.blocks[name][position // BLOCK_SIZE], position % BLOCK_SIZE
            if position >= start:
                self.memory[place] = state
            assert self.memory[place] == state, "memory holds what was computed of these tokens"
        if end < len(tokens):
            return []
        tokens.append(token_after(state))
        return tokens[-1:]


@dataclass
class Run:
    """What came out: tokens and log-probabilities by request, why it ended."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    log_probs: dict[str, list[float]] = field(default_factory=dict)
    reasons: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 0
    num_rows: int = 0


def request(name: int, *, prompt_tokens: int, max_tokens: int, ends: bool = True, **sampling: Any) -> Request:
    """Prompts of every third request begin alike."""
    params = SamplingParams(max_tokens=max_tokens, stop_token_ids=[END] if ends else [], logprobs=0, **sampling)
    prompt = [(7 * place + name % 3 + (name if place > 0.7 * prompt_tokens else 0)) % 50 for place in range(prompt_tokens)]
    return Request(
        request_id=str(name),
        prompt_token_ids=prompt,
        sampling_params=params,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )


def run(scheduler: AsyncScheduler, arrivals: dict[int, list[Request]], aborts: dict[int, str], *, depth: int) -> Run:
    """As vLLM's engine does: `depth` steps are under way (2: the next one is scheduled while one runs)."""
    model, found = Model(is_second=scheduler.use_v2_model_runner), Run()
    under_way = deque[tuple[SchedulerOutput, ModelRunnerOutput]]()
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
            result = model.run(step)
            if step.total_num_scheduled_tokens:
                under_way.append((step, result))
        if under_way and (len(under_way) == depth or not scheduler.has_requests() or not step.total_num_scheduled_tokens):
            for outputs in scheduler.update_from_output(*under_way.popleft()).values():
                for output in outputs.outputs:
                    name = output.request_id
                    assert name not in found.reasons, "nothing comes after the end"
                    found.tokens.setdefault(name, []).extend(output.new_token_ids)
                    found.log_probs.setdefault(name, []).extend(output.new_logprobs.logprobs[:, 0].tolist())
                    if output.finish_reason is not None:
                        found.reasons[name] = (output.finish_reason, output.stop_reason)
    found.num_steps, found.num_rows = model.num_steps, model.num_rows
    return found


def expected(arrivals: dict[int, list[Request]]) -> dict[str, list[int]]:
    """What each request gets by itself."""
    responses = {}
    for arriving in (one for several in arrivals.values() for one in several):
        tokens: list[int] = []
        state = 1
        for token in arriving.prompt_token_ids:
            state = further(state, token)
        most = min(arriving.max_tokens, MAX_TOKENS_OF_MODEL - arriving.num_prompt_tokens)
        ends = bool(arriving.sampling_params.stop_token_ids)
        while len(tokens) < most and not (ends and tokens[-1:] == [END]):
            tokens.append(token_after(state))
            state = further(state, tokens[-1])
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
@pytest.mark.parametrize("num_blocks", [1000, 60, 25])
@pytest.mark.parametrize("tokens_of_a_step", [64, MAX_REQUESTS])
@pytest.mark.parametrize("is_second_runner", [False, True])
def test_requests_get_their_tokens_with_and_without_rounds(
    config: VllmConfig, depth: int, num_blocks: int, tokens_of_a_step: int, is_second_runner: bool
) -> None:
    """Also where memory is short, so that requests are preempted, and where prompts come in small chunks."""
    config.scheduler_config.max_num_batched_tokens = tokens_of_a_step
    for seed in range(3):
        scheduler = scheduler_of(MultiStepScheduler, config, num_blocks=num_blocks)
        scheduler.use_v2_model_runner = is_second_runner
        found = run(scheduler, some_requests(seed), {}, depth=depth)
        assert found.tokens == expected(some_requests(seed))
        assert found.log_probs == {name: [-float(token) for token in tokens] for name, tokens in found.tokens.items()}
    plain = run(scheduler_of(AsyncScheduler, config, num_blocks=num_blocks), some_requests(seed), {}, depth=depth)
    assert found.reasons == plain.reasons


@pytest.mark.parametrize("depth", [1, 2])
def test_memory_that_suffices_without_rounds_suffices(config: VllmConfig, depth: int) -> None:
    config.scheduler_config.max_num_batched_tokens = 64
    for prompt_tokens, num_blocks in ((100, 9), (60, 4)):
        max_tokens = num_blocks * BLOCK_SIZE - prompt_tokens
        lone = {0: [request(1, prompt_tokens=prompt_tokens, max_tokens=max_tokens, ends=False)]}
        scheduler = scheduler_of(MultiStepScheduler, config, num_blocks=num_blocks + 1)  # one is vLLM's own
        assert run(scheduler, lone, {}, depth=depth).tokens == expected(lone)
    several = {0: [request(name, prompt_tokens=64, max_tokens=64, ends=False) for name in range(1, 9)]}
    assert run(scheduler_of(MultiStepScheduler, config, num_blocks=1 + 8 * 8), several, {}, depth=depth).tokens == expected(
        several
    )
    assert sum(one.num_preemptions for one in several[0]) == 0


def test_a_full_cache_is_told_at_first_and_where_it_has_doubled(config: VllmConfig, caplog: pytest.LogCaptureFixture) -> None:
    config.scheduler_config.max_num_batched_tokens = 64
    arrivals = {0: [request(name, prompt_tokens=10, max_tokens=140, ends=False) for name in range(1, 13)]}
    run(scheduler_of(MultiStepScheduler, config, num_blocks=30), arrivals, {}, depth=1)
    total = sum(one.num_preemptions for batch in arrivals.values() for one in batch)
    told = [record.args[0] for record in caplog.records if "key-value cache is full" in record.msg and record.args]
    assert total > 2 and told == [2**power for power in range(total.bit_length())]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [30, 41, 50])
def test_requests_that_were_repeated_before_they_are_sent_back_end_all_the_same(
    config: VllmConfig, depth: int, num_blocks: int
) -> None:
    config.scheduler_config.max_num_batched_tokens = 64
    arrivals = {0: [request(name, prompt_tokens=10, max_tokens=140, ends=False) for name in range(1, 9)]}
    scheduler = scheduler_of(MultiStepScheduler, config, num_blocks=num_blocks)
    assert run(scheduler, arrivals, {}, depth=depth).tokens == expected(arrivals)
    assert sum(one.num_preemptions for one in arrivals[0]) > 0
    assert scheduler.counters, "vLLM's own bookkeeping runs at every repetition: it has come to change more than counters"


@pytest.mark.parametrize("depth", [1, 2])
def test_arrivals_keep_no_answers_back(config: VllmConfig, depth: int) -> None:
    scheduler = scheduler_of(MultiStepScheduler, config)
    for name in range(1, MAX_REQUESTS + 1):
        scheduler.add_request(request(name, prompt_tokens=1, max_tokens=100, ends=False))
    model, under_way, num_answers = Model(), deque[tuple[SchedulerOutput, ModelRunnerOutput]](), 0
    for number in range(60):
        if number % 4 == 0:
            scheduler.add_request(request(1000 + number, prompt_tokens=5, max_tokens=1, ends=False))
        step = scheduler.schedule()
        under_way.append((step, model.run(step)))
        if len(under_way) == depth:
            num_answers += bool(scheduler.update_from_output(*under_way.popleft()))
    assert num_answers >= 60 // 8


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """The arguments of every call of this method of vLLM's own scheduler."""
    calls: list[tuple[Any, ...]] = []
    own = getattr(AsyncScheduler, name)
    monkeypatch.setattr(AsyncScheduler, name, lambda self, *args, **kwargs: calls.append(args) or own(self, *args, **kwargs))
    return calls


def test_a_round_is_scheduled_once(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, "schedule")
    long = {0: [request(name, prompt_tokens=10, max_tokens=100, ends=False) for name in (1, 2, 3)]}
    found = run(scheduler_of(MultiStepScheduler, config), long, {}, depth=2)
    assert [len(tokens) for tokens in found.tokens.values()] == [100] * 3
    assert found.num_steps <= 102, "no step in vain where all end together"
    assert len(calls) <= found.num_steps // MultiStepScheduler.max_steps + 7


def test_results_are_looked_at_once_before_the_next_decision(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses end all the time here. Where an empty step may stand between, each decision knows of every end before it; else
    the last result of a round is looked at behind it, which costs a decision of its own."""
    config.scheduler_config.max_num_batched_tokens = 4096
    monkeypatch.setattr(MultiStepScheduler, "max_steps", 8)
    decisions, looks = calls_of(monkeypatch, "schedule"), calls_of(monkeypatch, "update_from_output")
    counts = {}
    for is_second_runner in (False, True):
        arriving = {0: [request(name, prompt_tokens=10, max_tokens=140) for name in range(MAX_REQUESTS)]}
        scheduler = scheduler_of(MultiStepScheduler, config)
        scheduler.use_v2_model_runner = is_second_runner
        found = run(scheduler, arriving, {}, depth=2)
        assert found.tokens == expected(arriving)
        counts[is_second_runner] = len(decisions), sum(bool(step.num_scheduled_tokens) for step, _ in looks)
        decisions.clear()
        looks.clear()
    assert counts[True][0] < 0.85 * counts[False][0]
    assert counts[True][1] < 0.7 * counts[False][1], counts


def test_short_responses_compute_little_in_vain(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    config.scheduler_config.max_num_batched_tokens = 512
    runs = [
        run(
            scheduler_of(kind, config),
            {0: [request(name, prompt_tokens=10, max_tokens=2 + name % 9, ends=False) for name in range(80)]},
            {},
            depth=2,
        )
        for kind in (AsyncScheduler, MultiStepScheduler)
    ]
    assert runs[1].num_rows <= 1.05 * runs[0].num_rows


def test_aborted_requests_end_and_the_others_go_on(config: VllmConfig) -> None:
    for seed in range(4):
        arrivals = some_requests(seed)
        aborts = {13 + 5 * number: str(4 * number) for number in range(12)}
        for depth in (1, 2):
            found = run(scheduler_of(MultiStepScheduler, config), some_requests(seed), aborts, depth=depth)
            responses = expected(arrivals)
            for name, tokens in responses.items():
                if name in aborts.values():
                    assert found.tokens.get(name, []) == tokens[: len(found.tokens.get(name, []))]
                else:
                    assert found.tokens[name] == tokens


def test_prompts_in_chunks_of_one_token_are_no_decoding(config: VllmConfig) -> None:
    config.scheduler_config.max_num_batched_tokens = MAX_REQUESTS
    scheduler = scheduler_of(MultiStepScheduler, config)
    others = [request(name, prompt_tokens=1, max_tokens=90, ends=False) for name in range(1, MAX_REQUESTS)]
    arrivals = {0: others, 2: [request(999, prompt_tokens=40, max_tokens=10)]}
    found = run(scheduler, arrivals, {}, depth=2)
    assert found.tokens["999"] == expected({0: arrivals[2]})["999"]
    assert [len(found.tokens[one.request_id]) for one in others] == [90] * len(others)


def test_requests_that_arrive_within_a_round_do_not_wait_for_its_end(config: VllmConfig) -> None:
    config.scheduler_config.max_num_batched_tokens = 64
    scheduler = scheduler_of(MultiStepScheduler, config)
    scheduler.add_request(request(1, prompt_tokens=10, max_tokens=100))
    assert in_a_round(scheduler)[-1].num_scheduled_tokens == {"1": 1}
    scheduler.add_request(request(2, prompt_tokens=10, max_tokens=100))
    assert scheduler.schedule().num_scheduled_tokens == {"1": 1, "2": 10}


def in_a_round(scheduler: AsyncScheduler) -> list[SchedulerOutput]:
    """Steps, the last of which is to be repeated."""
    steps = [scheduler.schedule()]
    while scheduler.repetitions_left < 2:
        steps.append(scheduler.schedule())
    return steps


def test_the_worker_hears_of_an_abort_beside_an_arrival(config: VllmConfig) -> None:
    config.scheduler_config.max_num_batched_tokens = 64
    scheduler, heard = scheduler_of(MultiStepScheduler, config), set[str]()
    for name in range(1, MAX_REQUESTS + 2):
        scheduler.add_request(request(name, prompt_tokens=1, max_tokens=100, ends=False))
    for step in in_a_round(scheduler):
        heard |= step.finished_req_ids
    scheduler.finish_requests(str(MAX_REQUESTS + 1), RequestStatus.FINISHED_ABORTED)  # which waited
    scheduler.add_request(request(99, prompt_tokens=1, max_tokens=100))
    assert str(MAX_REQUESTS + 1) in scheduler.schedule().finished_req_ids


def test_a_paused_scheduler_repeats_nothing(config: VllmConfig) -> None:
    scheduler = scheduler_of(MultiStepScheduler, config)
    scheduler.add_request(request(1, prompt_tokens=10, max_tokens=100, ends=False))
    assert in_a_round(scheduler)[-1].total_num_scheduled_tokens == 1
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert scheduler.schedule().total_num_scheduled_tokens == 0


def test_results_with_more_than_tokens_are_not_joined(config: VllmConfig) -> None:
    """Log-probabilities of a prompt come with its last chunk, which may be a single token."""
    config.scheduler_config.max_num_batched_tokens = MAX_REQUESTS
    scheduler, model, outputs = scheduler_of(MultiStepScheduler, config), Model(), []
    scheduler.add_request(request(1, prompt_tokens=MAX_REQUESTS + 1, max_tokens=20, ends=False, prompt_logprobs=0))
    for number in range(20):
        step = scheduler.schedule()
        result = model.run(step)
        if number == 1:
            assert step.num_scheduled_tokens == {"1": 1}
            result.prompt_logprobs_dict = {"1": "of the prompt"}
        outputs += [output for found in scheduler.update_from_output(step, result).values() for output in found.outputs]
    assert [output.new_prompt_logprobs_tensors for output in outputs].count("of the prompt") == 1


@pytest.mark.parametrize("what", ["stop strings", "sliding window"])
def test_what_rounds_would_break_goes_step_by_step(config: VllmConfig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    calls = calls_of(monkeypatch, "schedule")
    sampling = {"stop": ["so"], "detokenize": True} if what == "stop strings" else {}
    window = {"sliding_window": 64} if what == "sliding window" else {}
    asked = {0: [request(name, prompt_tokens=10, max_tokens=50, **sampling) for name in (1, 2, 3)]}
    found = run(scheduler_of(MultiStepScheduler, config, **window), asked, {}, depth=2)
    assert found.tokens == expected(asked)
    assert len(calls) >= found.num_steps
