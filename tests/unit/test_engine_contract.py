"""What every generation engine promises, on CPU in float32. Engines that are not installed are skipped by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hybridflow import registry
from hybridflow.errors import EngineError
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Response, Sampling
from tests.toy import make_tiny_model

pytestmark = pytest.mark.timeout(120)  # an engine that lost a request would be stepped for ever
MAX_MODEL_TOKENS = 256
GREEDY = Sampling(temperature=0.0, max_tokens=24)
RANDOM = Sampling(temperature=1.0, max_tokens=24)
LONG = Sampling(temperature=0.0, max_tokens=96, ignore_eos=True)


def spec_of(model: str, **changes: object) -> EngineSpec:
    spec = EngineSpec(
        model=model,
        dtype="float32",
        max_model_tokens=MAX_MODEL_TOKENS,
        max_num_seqs=64,
        seed=0,
        device=torch.device("cpu"),
        layout=Layout(),
        rank=0,
        gpu_memory_utilization=0.5,
        cpu_cache_gib=0.25,
        enforce_eager=True,
    )
    return replace(spec, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with heads of 32 numbers, the fewest that vLLM's attention on CPU takes."""
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=128)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with other weights."""
    return make_tiny_model(tmp_path_factory.mktemp("other_model"), hidden_size=128, seed=1)


@pytest.fixture(
    scope="module",
    params=["torch", pytest.param("vllm", marks=pytest.mark.vllm), pytest.param("sglang", marks=pytest.mark.sglang)],
)
def engine(request: pytest.FixtureRequest, model: str) -> Iterator[Engine]:
    name = request.param
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: its engine is NOT tested on this machine")
    engine_class = registry.load(name, registry.ENGINES, key="rollout.engine")
    assert isinstance(engine_class, type) and issubclass(engine_class, Engine)
    engine = engine_class(spec_of(model))
    yield engine
    engine.close()


@pytest.fixture
def reloaded(engine: Engine, model: str) -> Iterator[Engine]:
    """The engine, for tests that change its weights: they are put back."""
    yield engine
    engine.load_weights(weights_of(model))


@pytest.fixture(scope="module")
def reference(model: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def weights_of(folder: str) -> list[tuple[str, torch.Tensor]]:
    return list(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict().items())


def prompts(count: int, *, longest: int = 20, seed: int = 0) -> list[npt.NDArray[np.int32]]:
    random = np.random.default_rng(seed)
    return [random.integers(4, 64, random.integers(1, longest + 1)).astype(np.int32) for _ in range(count)]


def requests(tokens: Sequence[npt.NDArray[np.int32]], sampling: Sampling) -> list[Request]:
    return [Request(id=i, prompt=prompt, sampling=sampling, seed=100 + i) for i, prompt in enumerate(tokens)]


def tokens_of(responses: Sequence[Response]) -> list[list[int]]:
    return [response.tokens.tolist() for response in responses]


@torch.no_grad()
def forward_log_probs(
    reference: PreTrainedModel, prompt: npt.NDArray[np.int32], response: Response, temperature: float
) -> torch.Tensor:
    whole = torch.from_numpy(np.concatenate([prompt, response.tokens])).long()
    logits = reference(whole[None]).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.from_numpy(response.tokens).long()[:, None])[:, 0]


def test_greedy_tokens_are_those_of_transformers(engine: Engine, reference: PreTrainedModel) -> None:
    asked = prompts(12)
    for prompt, response in zip(asked, engine.generate(requests(asked, GREEDY)), strict=True):
        whole = reference.generate(torch.from_numpy(prompt).long()[None], do_sample=False, max_new_tokens=GREEDY.max_tokens)
        assert response.tokens.tolist() == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probs_are_those_of_a_forward_pass(engine: Engine, reference: PreTrainedModel, temperature: float) -> None:
    asked = prompts(12)
    responses = engine.generate(requests(asked, replace(RANDOM, temperature=temperature)))
    for prompt, response in zip(asked, responses, strict=True):
        assert response.log_probs is not None and response.log_probs.dtype == np.float32
        expected = forward_log_probs(reference, prompt, response, temperature or 1.0)  # greedy: of the unscaled logits
        torch.testing.assert_close(torch.from_numpy(response.log_probs), expected, atol=1e-4, rtol=0)


def test_log_probs_are_left_out_where_not_asked_for(engine: Engine) -> None:
    (response,) = engine.generate(requests(prompts(1), replace(RANDOM, log_probs=False)))
    assert response.log_probs is None


def test_a_response_does_not_depend_on_its_neighbours(engine: Engine) -> None:
    asked = requests(prompts(20), RANDOM)
    together = engine.generate(asked)
    alone = [engine.generate([request])[0] for request in asked[:5]]
    assert tokens_of(alone) == tokens_of(together[:5])
    assert tokens_of(engine.generate(asked[::-1])[::-1]) == tokens_of(together)
    greedy = [replace(request, id=100 + request.id, sampling=replace(RANDOM, temperature=0.0)) for request in asked[:3]]
    assert tokens_of(engine.generate([greedy[0], *asked, *greedy[1:]])[1:21]) == tokens_of(together)


def test_another_seed_gives_another_response(engine: Engine) -> None:
    request = requests(prompts(1), replace(RANDOM, ignore_eos=True))[0]
    responses = engine.generate([replace(request, id=seed, seed=seed) for seed in range(8)])
    assert len({tuple(tokens) for tokens in tokens_of(responses)}) == 8


def test_tokens_are_drawn_with_their_probabilities(engine: Engine, reference: PreTrainedModel) -> None:
    prompt, count = prompts(1)[0], 2000
    sampling = replace(RANDOM, temperature=1.5, max_tokens=1, log_probs=False)
    drawn = engine.generate([Request(id=i, prompt=prompt, sampling=sampling, seed=i * 7919 + 13) for i in range(count)])
    counts = np.bincount([int(response.tokens[0]) for response in drawn], minlength=64)
    with torch.no_grad():
        expected = count * (reference(torch.from_numpy(prompt).long()[None]).logits[0, -1] / 1.5).softmax(-1).numpy()
    common = expected >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    # Chi-square has mean d and variance 2 d for d = cells - 1: five standard deviations above it is never seen.
    freedom = len(observed) - 1
    assert ((observed - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_top_k_of_one_is_greedy(engine: Engine) -> None:
    asked = prompts(6)
    only = replace(RANDOM, top_k=1, log_probs=False)
    assert tokens_of(engine.generate(requests(asked, only))) == tokens_of(engine.generate(requests(asked, GREEDY)))


@pytest.mark.parametrize("cut", [{"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 3}])
def test_cuts_leave_only_the_likely_tokens(engine: Engine, reference: PreTrainedModel, cut: dict[str, float]) -> None:
    prompt = prompts(1)[0]
    sampling = replace(RANDOM, max_tokens=1, log_probs=False, **cut)
    drawn = engine.generate([Request(id=i, prompt=prompt, sampling=sampling, seed=i) for i in range(300)])
    with torch.no_grad():
        probs, order = reference(torch.from_numpy(prompt).long()[None]).logits[0, -1].softmax(-1).sort(descending=True)
    num_kept = {
        "top_p": int((probs.cumsum(0) - probs < 0.5).sum()),
        "min_p": int((probs >= 0.3 * probs[0]).sum()),
        "top_k": 3,
    }[next(iter(cut))]
    assert {int(response.tokens[0]) for response in drawn} == set(order[:num_kept].tolist())


def test_log_probs_are_before_the_cuts_or_refused(engine: Engine, reference: PreTrainedModel) -> None:
    (asked,) = requests(prompts(1), replace(RANDOM, top_k=2))
    try:
        (response,) = engine.generate([asked])
    except EngineError as error:
        assert "log-probabilities" in str(error) and engine.num_unfinished == 0
        return
    expected = forward_log_probs(reference, asked.prompt, response, 1.0)
    torch.testing.assert_close(torch.from_numpy(response.log_probs), expected, atol=1e-4, rtol=0)


def test_a_response_ends_at_its_length_limit(engine: Engine) -> None:
    limits = [1, 2, 7, 24]
    asked = [
        Request(id=limit, prompt=prompt, sampling=replace(RANDOM, max_tokens=limit, ignore_eos=True), seed=limit)
        for limit, prompt in zip(limits, prompts(4), strict=True)
    ]
    responses = engine.generate(asked)
    assert [len(response.tokens) for response in responses] == limits
    assert {response.finish_reason for response in responses} == {"length"}


def test_a_stop_token_ends_a_response_and_stays_in_it(engine: Engine) -> None:
    request = requests(prompts(1), replace(RANDOM, ignore_eos=True))[0]
    whole = engine.generate([request])[0].tokens.tolist()
    stop = whole[10]
    (response,) = engine.generate([replace(request, sampling=replace(request.sampling, stop_token_ids=(stop,)))])
    assert response.tokens.tolist() == whole[: whole.index(stop) + 1]
    assert response.finish_reason == "stop"


def test_the_end_of_sequence_ends_a_response_unless_ignored(engine: Engine, model: str) -> None:
    end = AutoTokenizer.from_pretrained(model).eos_token_id
    long = replace(RANDOM, max_tokens=100)
    ended = [response for response in engine.generate(requests(prompts(30), long)) if response.finish_reason == "stop"]
    assert ended and all(response.tokens[-1] == end and end not in response.tokens[:-1] for response in ended)
    ignored = engine.generate(requests(prompts(30), replace(long, ignore_eos=True)))
    assert {len(response.tokens) for response in ignored} == {100}


def test_a_stop_string_over_several_tokens_ends_a_response(engine: Engine, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    request = requests(prompts(1, seed=3), replace(RANDOM, ignore_eos=True))[0]
    whole = engine.generate([request])[0].tokens.tolist()
    stop = tokenizer.decode(whole[8:11])  # three characters, one token each
    (response,) = engine.generate([replace(request, sampling=replace(request.sampling, stop=("never", stop)))])
    ends = [end for end in range(1, len(whole) + 1) if stop in tokenizer.decode(whole[:end])]
    assert response.tokens.tolist() == whole[: ends[0]]
    assert response.finish_reason == "stop"


def test_of_a_thousand_requests_none_is_lost(engine: Engine) -> None:
    random = np.random.default_rng(5)
    lengths = random.integers(1, 40, 1000)
    asked = [
        Request(
            id=i, prompt=prompt, sampling=replace(RANDOM, max_tokens=int(length), ignore_eos=True, log_probs=i % 2 == 0), seed=i
        )
        for i, (prompt, length) in enumerate(zip(prompts(1000, longest=60, seed=5), lengths, strict=True))
    ]
    responses = engine.generate(asked)
    assert [response.id for response in responses] == list(range(1000))
    assert [len(response.tokens) for response in responses] == lengths.tolist()
    assert engine.num_unfinished == 0


def test_requests_may_be_added_while_others_run(engine: Engine) -> None:
    asked = requests(prompts(6), replace(RANDOM, ignore_eos=True))
    expected = tokens_of(engine.generate(asked))
    for request in asked[:3]:
        engine.add(request)
    finished = [response for _ in range(5) for response in engine.step()]
    for request in asked[3:]:
        engine.add(request)
    while engine.num_unfinished:
        finished += engine.step()
    assert tokens_of(sorted(finished, key=lambda response: response.id)) == expected


def interrupted_after(engine: Engine, asked: Sequence[Request], num_steps: int) -> list[Response]:
    """The responses of an engine that is interrupted after some steps, in the order of the requests."""
    for request in asked:
        engine.add(request)
    found = [response for _ in range(num_steps) for response in engine.step()]
    found += engine.interrupt()
    assert engine.num_unfinished == 0
    assert sorted(response.id for response in found) == sorted(request.id for request in asked)
    return sorted(found, key=lambda response: response.id)


def going_on(request: Request, partial: Response) -> Request:
    """What asks for the rest of a response."""
    left = replace(request.sampling, max_tokens=request.sampling.max_tokens - len(partial.tokens))
    return replace(request, prompt=np.concatenate([request.prompt, partial.tokens]), sampling=left)


def test_an_interrupted_response_goes_on_where_it_was(engine: Engine) -> None:
    asked = requests(prompts(12), LONG)
    whole = engine.generate(asked)
    partial = interrupted_after(engine, asked, num_steps=40)
    assert {response.finish_reason for response in partial} == {"interrupted"}
    assert all(0 < len(response.tokens) < LONG.max_tokens for response in partial)
    rest = engine.generate([going_on(request, part) for request, part in zip(asked, partial, strict=True)])
    for expected, before, after in zip(whole, partial, rest, strict=True):
        assert [*before.tokens, *after.tokens] == expected.tokens.tolist()
        joined = np.concatenate([before.log_probs, after.log_probs])
        np.testing.assert_allclose(joined, expected.log_probs, atol=1e-4)


def test_requests_that_wait_are_interrupted_too(engine: Engine) -> None:
    """There are more of them than run at once."""
    asked = requests(prompts(100), replace(LONG, log_probs=False))
    whole = tokens_of(engine.generate(asked))
    partial = interrupted_after(engine, asked, num_steps=30)
    assert any(len(response.tokens) for response in partial) and not all(len(response.tokens) for response in partial)
    for response, expected in zip(partial, whole, strict=True):
        assert response.tokens.tolist() == expected[: len(response.tokens)] and response.log_probs is None
    assert tokens_of(engine.generate(asked)) == whole


def test_an_idle_engine_may_be_interrupted(engine: Engine) -> None:
    assert engine.interrupt() == []
    assert len(engine.generate(requests(prompts(2), GREEDY))) == 2


def test_an_interrupt_before_the_first_step_leaves_no_tokens(engine: Engine) -> None:
    partial = interrupted_after(engine, requests(prompts(3), RANDOM), num_steps=0)
    assert [response.finish_reason for response in partial] == ["interrupted"] * 3
    assert all(len(response.tokens) == len(response.log_probs) == 0 for response in partial)


def test_the_rest_of_an_interrupted_response_is_of_the_new_weights(reloaded: Engine, model: str, other_model: str) -> None:
    asked = requests(prompts(6, longest=60), LONG)
    partial = interrupted_after(reloaded, asked, num_steps=40)
    reloaded.load_weights(weights_of(other_model))
    rest = [going_on(request, part) for request, part in zip(asked, partial, strict=True)]
    responses = reloaded.generate(rest)
    other = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32).eval()
    for request, response in zip(rest, responses, strict=True):
        expected = forward_log_probs(other, request.prompt, response, 1.0)
        torch.testing.assert_close(torch.from_numpy(response.log_probs), expected, atol=1e-4, rtol=0)


def test_loaded_weights_are_what_generates(reloaded: Engine, other_model: str) -> None:
    """The prompts are long and the same before and after: a stale prefix cache would change the log-probabilities."""
    asked = [np.random.default_rng(i).integers(4, 64, 200).astype(np.int32) for i in range(4)]
    before = reloaded.generate(requests(asked, GREEDY))
    reloaded.load_weights(weights_of(other_model))
    after = reloaded.generate(requests(asked, GREEDY))
    assert tokens_of(after) != tokens_of(before)
    other = AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32).eval()
    for prompt, response in zip(asked, after, strict=True):
        expected = forward_log_probs(other, prompt, response, 1.0)
        torch.testing.assert_close(torch.from_numpy(response.log_probs), expected, atol=1e-4, rtol=0)


def test_weights_may_arrive_in_a_buffer_that_is_reused(reloaded: Engine, other_model: str) -> None:
    weights = weights_of(other_model)
    buffer = torch.empty(max(tensor.numel() for _, tensor in weights))

    def reusing() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            yield name, buffer[: tensor.numel()].view_as(tensor).copy_(tensor)
        buffer.fill_(float("nan"))

    reloaded.load_weights(weights)
    expected = reloaded.generate(requests(prompts(4), GREEDY))
    reloaded.load_weights(reusing())
    assert tokens_of(reloaded.generate(requests(prompts(4), GREEDY))) == tokens_of(expected)


def test_held_weights_are_what_was_loaded(reloaded: Engine, other_model: str) -> None:
    weights = dict(weights_of(other_model))
    reloaded.load_weights(weights.items())
    held = dict(reloaded.held_weights())
    if not held:
        pytest.skip(f"{type(reloaded).__name__} holds its weights where they cannot be read back")
    assert held.keys() == weights.keys()
    assert [name for name, tensor in held.items() if not torch.equal(tensor, weights[name])] == []


@pytest.mark.parametrize("fault", ["missing", "unknown", "transposed"])
def test_wrong_weights_are_refused(reloaded: Engine, other_model: str, fault: str) -> None:
    weights = dict(weights_of(other_model))
    name = "model.layers.0.self_attn.k_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unknown":
        weights["model.layers.7.self_attn.k_proj.weight"] = weights[name]
    else:
        weights[name] = weights[name].t()
    with pytest.raises(EngineError, match="k_proj"):
        reloaded.load_weights(weights.items())


def test_weights_are_refused_while_requests_run(engine: Engine, other_model: str) -> None:
    engine.add(requests(prompts(1), RANDOM)[0])
    with pytest.raises(EngineError, match="1 requests are unfinished"):
        engine.load_weights(weights_of(other_model))
    while engine.num_unfinished:
        engine.step()


@pytest.mark.parametrize("num_prompt", [0, MAX_MODEL_TOKENS - GREEDY.max_tokens + 1])
def test_a_request_that_does_not_fit_is_refused(engine: Engine, num_prompt: int) -> None:
    with pytest.raises(EngineError, match=f"request 7 has {num_prompt} prompt tokens"):
        engine.add(Request(id=7, prompt=np.full(num_prompt, 5, np.int32), sampling=GREEDY))
    assert engine.num_unfinished == 0


def test_an_engine_that_slept_generates_as_before(engine: Engine, request: pytest.FixtureRequest) -> None:
    if "vllm" in request.node.name:
        pytest.skip("NOT RUN: vLLM sleeps on CUDA alone; tests/gpu/test_sleep_on_gpu.py tests it there")
    asked = requests(prompts(4), RANDOM)
    before = engine.generate(asked)
    engine.sleep()
    engine.wake()
    assert tokens_of(engine.generate(asked)) == tokens_of(before)
