"""What only the vLLM engine has to get right, on CPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hybridflow.errors import EngineError
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Request, Sampling
from hybridflow.rollout.sampling import sample
from hybridflow.rollout.seeds import uniform
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.rollout.torch_engine import TorchEngine
from tests.toy import make_tiny_model
from tests.unit.test_engine_contract import prompts, requests, spec_of, tokens_of, weights_of

if TYPE_CHECKING:
    from hybridflow.rollout.vllm_engine import VllmEngine

pytest.importorskip("vllm", reason="vllm is not installed: its engine is NOT tested on this machine")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(120)]
GREEDY = Sampling(temperature=0.0, max_tokens=24)


def tied_model(folder: Path, *, seed: int) -> str:
    """Embedding and output layer are one weight, and the vocabulary is none that vLLM can do without padding."""
    return make_tiny_model(folder, seed=seed, hidden_size=128, vocab_size=77, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return tied_model(tmp_path_factory.mktemp("tied"), seed=0), tied_model(tmp_path_factory.mktemp("tied"), seed=1)


@pytest.fixture(scope="module")
def engine(folders: tuple[str, str]) -> Iterator[VllmEngine]:
    from hybridflow.rollout.vllm_engine import VllmEngine

    engine = VllmEngine(spec_of(folders[0], options={"max_num_seqs": 32}))
    yield engine
    engine.close()


def test_a_reload_reaches_the_output_layer_that_shares_the_embedding(engine: VllmEngine, folders: tuple[str, str]) -> None:
    asked = requests(prompts(8), GREEDY)
    for folder in (folders[1], folders[0]):
        engine.load_weights(weights_of(folder))
        assert tokens_of(engine.generate(asked)) == tokens_of(TorchEngine(spec_of(folder)).generate(asked))


def test_held_weights_show_an_output_layer_that_was_not_packed_again(engine: VllmEngine, folders: tuple[str, str]) -> None:
    weights = {name: tensor for name, tensor in weights_of(folders[0]) if name != "lm_head.weight"}
    engine.load_weights(weights.items())
    held = dict(engine.named_parameters())
    assert held.keys() == weights.keys()
    assert [name for name, tensor in held.items() if not torch.equal(tensor, weights[name])] == []
    with torch.no_grad():
        engine.model.get_parameter("model.embed_tokens.weight").mul_(2.0)  # as a reload does that forgets to pack
    assert torch.equal(dict(engine.named_parameters())["model.embed_tokens.weight"], weights["model.embed_tokens.weight"])
    engine.load_weights(weights.items())


def test_reading_all_weights_walks_the_model_once_at_most(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    modules = type(engine.model).modules
    monkeypatch.setattr(type(engine.model), "modules", lambda model: walks.append(model) or modules(model))
    assert len(dict(engine.named_parameters())) > 10
    assert len(walks) <= 1, "once for each weight takes 0.08 s of every sync with a model of 0.5B"


def test_a_weight_too_large_to_read_back_is_left_out(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for name, _ in engine.named_parameters()}
    monkeypatch.setattr("hybridflow.rollout.vllm_patches.MOST_ELEMENTS_READ_BACK", 10_000)
    left_out = names - {name for name, _ in engine.named_parameters()}
    # q, k and v are one layer of 256 x 128; so are gate and up. Biases and norms are never packed.
    assert "model.layers.0.self_attn.q_proj.weight" in left_out
    assert all(name.endswith("_proj.weight") or "embed" in name for name in left_out)


@pytest.fixture
def sample_twice(engine: VllmEngine) -> Iterator[Callable[[int, int], list[list[int]]]]:
    """Two answers to one prompt and one seed, by the engine of a data rank."""
    (prompt,) = prompts(1)
    with_seeds = engine.spec

    def of(data_rank: int, seed: int) -> list[list[int]]:
        engine.spec = dataclasses.replace(with_seeds, layout=Layout(data=2), rank=data_rank)
        engine.heeds_seeds = False
        asked = [Request(id=i, prompt=prompt, sampling=Sampling(max_tokens=20, ignore_eos=True), seed=seed) for i in range(2)]
        return tokens_of(engine.generate(asked))

    with torch.random.fork_rng():
        yield of
    engine.spec, engine.heeds_seeds = with_seeds, True


def test_without_seeds_of_requests_nothing_is_sampled_twice(sample_twice: Callable[[int, int], list[list[int]]]) -> None:
    sampled = [*sample_twice(0, 7), *sample_twice(1, 7), *sample_twice(0, 8)]
    assert len({tuple(answer) for answer in sampled}) == 6, "neither by one engine, nor by two, nor for other first requests"
    assert sample_twice(0, 7) == sampled[:2], "a run repeats, and a resumed one goes on, where the engine is asked alike"


def test_a_request_that_vllm_refuses_fails_alone(folders: tuple[str, str]) -> None:
    from hybridflow.rollout.vllm_engine import VllmEngine

    (good,) = requests(prompts(1), GREEDY)
    outside = Request(id=1, prompt=np.array([10**6], np.int32), sampling=GREEDY)
    thread = EngineThread(VllmEngine(spec_of(folders[0])))
    try:
        before, between, after = thread.submit([good, outside, good])
        with pytest.raises(EngineError, match=r"vLLM refuses request .* vocabulary"):
            between.result(60)
        assert before.result(60).tokens.tolist() == after.result(60).tokens.tolist() != []
    finally:
        thread.close()


def test_starting_an_engine_leaves_random_states_alone(folders: tuple[str, str]) -> None:
    from hybridflow.rollout.vllm_engine import _kept_random_state

    torch.manual_seed(5)
    np.random.seed(5)
    with _kept_random_state():
        torch.manual_seed(0)
        np.random.seed(0)
    sampled = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    assert sampled == (torch.rand(1).item(), np.random.rand())


def test_engine_options_reach_vllm(engine: VllmEngine) -> None:
    assert engine.engine.vllm_config.scheduler_config.max_num_seqs == 32


def test_an_unknown_engine_option_is_named(folders: tuple[str, str]) -> None:
    from hybridflow.rollout.vllm_engine import VllmEngine

    with pytest.raises(EngineError, match=r"rollout.engine_options.max_num_seq is no argument.*'max_num_seqs'"):
        VllmEngine(spec_of(folders[0], options={"max_num_seq": 32}))


@pytest.mark.parametrize(
    ("options", "cache_gib", "said"),
    [
        ({"block_size": 7}, 1.0, ["No common block size for 7", "It was given rollout.engine_options={'block_size': 7}."]),
        ({"kv_cache_dtype": "foo"}, 1.0, ["cache_dtype", "Input should be 'auto'"]),
        ({"max_num_batched_tokens": 64}, 1.0, ["(64) is smaller than", "calls max_model_len is data.max_prompt_tokens and"]),
        (
            {},
            1e-5,
            [
                "No available memory",
                "gpu_memory_utilization is rollout.gpu_memory_utilization (on a CPU rollout.cpu_cache_gib)",
            ],
        ),
        ({"enable_chunked_prefill": True}, 1.0, ["on a CPU vLLM cannot take prompts in chunks", "rollout.seed_requests=false"]),
    ],
)
def test_what_vllm_refuses_is_told_in_our_keys(
    folders: tuple[str, str], options: dict[str, object], cache_gib: float, said: list[str]
) -> None:
    from hybridflow.rollout.vllm_engine import VllmEngine

    with pytest.raises(EngineError) as caught:
        VllmEngine(dataclasses.replace(spec_of(folders[0], options=options), cpu_cache_gib=cache_gib))
    assert all(part in str(caught.value) for part in said), str(caught.value)
    assert "type=" not in str(caught.value) and "errors.pydantic" not in str(caught.value)


class Counting:
    """What sampling uses of a generator of CUDA, which no CPU has."""

    def __init__(self, seed: int, num_tokens: int):
        self.seed, self.offset = seed, 4 * num_tokens

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_samples_at_once_depend_on_seed_and_number_of_the_token_alone() -> None:
    from hybridflow.rollout.vllm_patches import sample_at_once

    probs_BV = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0))
    generators = {2: Counting(7, 5), 0: Counting(2**63 - 1, 5), 1: Counting(7, 6)}  # vLLM's order is not that of the rows
    tokens = sample_at_once(probs_BV, generators).tolist()
    assert [generator.offset for generator in generators.values()] == [24, 24, 28]
    expected = sample(probs_BV, torch.from_numpy(uniform(np.array([2**63 - 1, 7, 7], np.uint64), np.array([5, 6, 5]))))
    assert tokens == expected.tolist()
    assert sample_at_once(probs_BV[2:], {0: Counting(7, 5)}).tolist() == tokens[2:], "alone, and in another row"
    dropped = Counting(7, 6)
    dropped.set_offset(dropped.get_offset() - 4)  # as vLLM does where it drops a token
    assert sample_at_once(probs_BV[2:], {0: dropped}).tolist() == tokens[2:]


def test_rows_without_a_seed_are_drawn_as_vllm_does_and_change_nothing_for_others() -> None:
    from hybridflow.rollout.vllm_patches import sample_at_once

    probs_BV = torch.rand(4, 1000, generator=torch.Generator().manual_seed(0))
    probs_BV[1] = torch.eye(1000)[17]
    with torch.random.fork_rng():
        assert sample_at_once(probs_BV[1:2], {}).tolist() == [17]
        tokens = sample_at_once(probs_BV, {row: Counting(row, 3) for row in (3, 0, 2)}).tolist()
    alone = [sample_at_once(probs_BV[row : row + 1], {0: Counting(row, 3)}).item() for row in (0, 2, 3)]
    assert tokens == [alone[0], 17, *alone[1:]]


def test_an_engine_tells_how_much_of_a_prompt_it_took_from_its_cache(engine: VllmEngine) -> None:
    engine.reset_prefix_cache()
    (prompt,) = (np.resize(prompt, 200) for prompt in prompts(1))
    asked = [Request(id=0, prompt=prompt, sampling=Sampling(max_tokens=2), seed=1)]
    first, second = engine.generate(asked)[0], engine.generate(asked)[0]
    assert (first.num_cached_tokens, second.num_cached_tokens > 100) == (0, True)
    engine.reset_prefix_cache()
    assert engine.generate(asked)[0].num_cached_tokens == 0


ONE_ANSWER = """
import sys
from hybridflow.rollout.vllm_engine import VllmEngine
from tests.unit.test_engine_contract import prompts, requests, spec_of
from tests.unit.test_vllm_engine import GREEDY

engine = VllmEngine(spec_of(sys.argv[1]))
engine.generate(requests(prompts(1), GREEDY))
engine.close()
"""


def written(model: str, environment: dict[str, str]) -> str:
    """What a process that builds an engine and asks it once writes to the console."""
    command = [sys.executable, "-c", ONE_ANSWER, model]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    ended = subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, check=True)
    return ended.stdout + ended.stderr


@pytest.mark.slow
def test_vllm_is_silent_where_nothing_is_wrong_unless_asked_to_speak(folders: tuple[str, str]) -> None:
    silent = written(folders[0], {})
    assert [word for word in ("INFO ", "WARNING ", "FutureWarning", "Loading safetensors") if word in silent] == [], silent
    speaking = written(folders[0], {"VLLM_LOGGING_LEVEL": "INFO"})
    assert "INFO " in speaking and "The global random seed" in speaking


def test_the_users_options_hold_over_ours(folders: tuple[str, str]) -> None:
    from hybridflow.rollout.vllm_arguments import engine_arguments

    assert engine_arguments(spec_of(folders[0]))["use_tqdm_on_load"] is False
    assert engine_arguments(spec_of(folders[0], options={"use_tqdm_on_load": True}))["use_tqdm_on_load"] is True
