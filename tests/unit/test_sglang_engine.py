"""The adapter to SGLang against a stand-in with the interface that SGLang documents, which computes with the torch engine.

It shows that our side of the interface holds together; what SGLang itself does is for test_engine_contract.py, on a
machine that has it.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hybridflow.errors import EngineError
from hybridflow.rollout.base import Request, Sampling
from hybridflow.rollout.torch_engine import TorchEngine
from tests.toy import make_tiny_model
from tests.unit.test_engine_contract import prompts, requests, spec_of, tokens_of, weights_of

if TYPE_CHECKING:
    from hybridflow.rollout.sglang_engine import SglangEngine

RANDOM = Sampling(max_tokens=24)


class StandIn:
    """`sglang.Engine` as documented: asynchronous generation, weights in lists, results in dicts."""

    def __init__(self, **arguments: object):
        self.arguments = arguments
        self.loop = asyncio.new_event_loop()
        self.torch_engine = TorchEngine(spec_of(str(arguments["model_path"])))
        self.updates: list[list[str]] = []
        self.num_flushes = 0
        self.asleep: list[str] = []
        self.aborts = False
        self.gate = asyncio.Event()
        """Closed: requests are under way."""
        self.gate.set()
        self.is_aborted = False
        self.tokenizer_manager = self

    async def async_generate(
        self, *, input_ids: list[int], sampling_params: dict[str, object], return_logprob: bool
    ) -> dict[str, object]:
        assert return_logprob and sampling_params["no_stop_trim"]
        await self.gate.wait()
        sampling = Sampling(
            temperature=sampling_params["temperature"],
            max_tokens=sampling_params["max_new_tokens"],
            top_k=max(sampling_params["top_k"], 0),
            top_p=sampling_params["top_p"],
            stop=tuple(sampling_params["stop"]),
            stop_token_ids=tuple(sampling_params["stop_token_ids"]),
            ignore_eos=sampling_params["ignore_eos"],
        )
        asked = Request(id=0, prompt=np.array(input_ids, np.int32), sampling=sampling, seed=sampling_params["sampling_seed"])
        (response,) = self.torch_engine.generate([asked])
        if self.is_aborted:
            response = replace(response, tokens=response.tokens[:5], log_probs=response.log_probs[:5])
        pairs = zip(response.log_probs.tolist(), response.tokens.tolist(), strict=True)
        reason = "abort" if self.aborts or self.is_aborted else response.finish_reason
        meta = {"finish_reason": {"type": reason}, "output_token_logprobs": [(*pair, None) for pair in pairs]}
        return {"text": "", "meta_info": meta}

    def abort_request(self, *, abort_all: bool) -> None:
        """Those that have begun end after five tokens."""
        assert abort_all
        self.is_aborted = True
        self.gate.set()

    def update_weights_from_tensor(
        self, named_tensors: list[tuple[str, torch.Tensor]], *, flush_cache: bool
    ) -> tuple[bool, str]:
        assert not flush_cache
        self.updates.append([name for name, _ in named_tensors])
        own = self.torch_engine.model.state_dict()
        for name, tensor in named_tensors:
            own[name].copy_(tensor)
        return True, "ok"

    def flush_cache(self) -> SimpleNamespace:
        self.num_flushes += 1
        return SimpleNamespace(success=True)

    def release_memory_occupation(self, tags: list[str]) -> None:
        self.asleep = tags

    def resume_memory_occupation(self, tags: list[str]) -> None:
        assert self.asleep == tags
        self.asleep = []

    def shutdown(self) -> None:
        self.loop.close()


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch, tiny_model: str) -> Iterator[type[SglangEngine]]:
    """The engine class, importing the stand-in."""
    module = ModuleType("sglang")
    module.Engine = StandIn
    monkeypatch.setitem(sys.modules, "sglang", module)
    monkeypatch.delitem(sys.modules, "hybridflow.rollout.sglang_engine", raising=False)
    yield importlib.import_module("hybridflow.rollout.sglang_engine").SglangEngine
    sys.modules.pop("hybridflow.rollout.sglang_engine", None)


@pytest.fixture
def engine(adapter: type[SglangEngine], tiny_model: str) -> Iterator[SglangEngine]:
    engine = adapter(spec_of(tiny_model, can_sleep=True))
    yield engine
    engine.close()


def test_responses_are_those_of_the_engine_behind(engine: SglangEngine, tiny_model: str) -> None:
    asked = requests(prompts(20), RANDOM)
    found, expected = engine.generate(asked), TorchEngine(spec_of(tiny_model)).generate(asked)
    assert tokens_of(found) == tokens_of(expected)
    assert [response.finish_reason for response in found] == [response.finish_reason for response in expected]
    assert all(np.allclose(one.log_probs, other.log_probs, atol=1e-5) for one, other in zip(found, expected, strict=True))
    assert engine.num_unfinished == 0


def test_log_probs_are_left_out_where_not_asked_for(engine: SglangEngine) -> None:
    (response,) = engine.generate(requests(prompts(1), replace(RANDOM, log_probs=False)))
    assert response.log_probs is None and len(response.tokens)


def test_weights_go_over_in_buckets_and_the_cache_is_flushed(
    engine: SglangEngine, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_tiny_model(tmp_path_factory.mktemp("other"), seed=1)
    monkeypatch.setattr("hybridflow.rollout.sglang_engine.BYTES_PER_UPDATE", 40_000)
    weights = weights_of(other)
    engine.load_weights(weights)
    assert [name for update in engine.engine.updates for name in update] == [name for name, _ in weights]
    assert len(engine.engine.updates) > 2 and engine.engine.num_flushes == 1
    asked = requests(prompts(4), RANDOM)
    assert tokens_of(engine.generate(asked)) == tokens_of(TorchEngine(spec_of(other)).generate(asked))


def test_missing_weights_are_named(engine: SglangEngine, tiny_model: str) -> None:
    with pytest.raises(EngineError, match="1 of 27 weights were not given to the engine: lm_head"):
        engine.load_weights(weights_of(tiny_model)[:-1])


def test_an_aborted_request_is_reported(engine: SglangEngine) -> None:
    engine.engine.aborts = True
    with pytest.raises(EngineError, match=r"ended request 0 with .*abort"):
        engine.generate(requests(prompts(1), RANDOM))


def test_an_interrupt_aborts_and_keeps_what_there_is(engine: SglangEngine) -> None:
    asked = requests(prompts(3), replace(RANDOM, temperature=0.0, ignore_eos=True))
    whole = tokens_of(engine.generate(asked))
    engine.engine.gate.clear()
    for request in asked:
        engine.add(request)
    partial = engine.interrupt()
    engine.engine.is_aborted = False
    assert engine.num_unfinished == 0
    assert {response.finish_reason for response in partial} == {"interrupted"}
    assert tokens_of(sorted(partial, key=lambda response: response.id)) == [tokens[:5] for tokens in whole]
    assert tokens_of(engine.generate(asked)) == whole


def test_only_the_cache_sleeps(engine: SglangEngine) -> None:
    engine.sleep()
    assert engine.engine.asleep == ["kv_cache"]
    engine.wake_up()
    assert engine.engine.asleep == []


def test_arguments_are_the_specs_with_the_users_options_over_them(adapter: type[SglangEngine], tiny_model: str) -> None:
    engine = adapter(spec_of(tiny_model, options={"mem_fraction_static": 0.3, "attention_backend": "triton"}))
    arguments = engine.engine.arguments
    assert (arguments["model_path"], arguments["mem_fraction_static"]) == (tiny_model, 0.3)
    assert arguments["attention_backend"] == "triton" and arguments["enable_deterministic_inference"] is True
    engine.close()


def test_a_setting_that_changes_log_probs_is_refused(
    adapter: type[SglangEngine], tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", "1")
    with pytest.raises(EngineError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
        adapter(spec_of(tiny_model))
