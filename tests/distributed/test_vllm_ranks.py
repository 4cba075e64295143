"""vLLM on two ranks of one torch.distributed: two engines side by side, and one engine cut in two."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hybridflow.config.schema import Config, DataConfig, EnvironmentConfig, ModelConfig, RolloutConfig
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Sampling
from hybridflow.rollout.lockstep import lockstep
from hybridflow.rollout.step_thread import EngineThread
from hybridflow.rollout.torch_engine import TorchEngine
from hybridflow.workers.base import RankContext
from tests.distributed.ranks import start
from tests.toy import make_tiny_model
from tests.unit.episodes import episode_rows
from tests.unit.test_engine_contract import going_on, prompts, requests, spec_of, tokens_of, weights_of

pytest.importorskip("vllm", reason="vllm is not installed: its engine is NOT tested on this machine")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def _rank(rank: int, tensor: int, folder: str) -> None:
    from hybridflow.rollout.vllm_engine import VllmEngine

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layout = Layout(data=2 // tensor, tensor=tensor)
    thread = EngineThread(VllmEngine(spec_of(f"{folder}/old", rank=rank, layout=layout)), agree=lockstep(layout, rank))
    asked = requests(prompts(20, seed=layout.data_rank(rank)), Sampling(temperature=0.0, max_tokens=24))
    thread.generate(asked)
    weights = weights_of(f"{folder}/new")
    with thread.paused() as engine:
        engine.load_weights(weights)
        held = {name: tensor.numel() for name, tensor in engine.named_parameters()}
    matrices = [name for name, weight in weights if weight.dim() == 2]
    assert all(held[name] * tensor == dict(weights)[name].numel() for name in matrices)
    expected = TorchEngine(spec_of(f"{folder}/new")).generate(asked)
    found = thread.generate(asked)
    assert tokens_of(found) == tokens_of(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    _check_interrupts(thread, late=rank == 1)
    thread.close()
    total = torch.ones(1)
    dist.all_reduce(total)  # the group of the pool is alive after the engine
    assert total.item() == 2


def _check_interrupts(thread: EngineThread, *, late: bool) -> None:
    """Rows that are interrupted, whatever the ranks have seen of them by then, end as they would have."""
    sampling = Sampling(temperature=0.0, max_tokens=200, ignore_eos=True)
    asked = requests(prompts(6), sampling)
    whole = thread.generate(asked)
    for _ in range(3):
        futures = [future for request in asked for future in thread.submit([request])]
        time.sleep(0.3 if late else 0.1)
        thread.interrupt()
        partial = [future.result(0) for future in futures]
        assert {response.finish_reason for response in partial} <= {"interrupted", "length"}
        unfinished = [index for index, response in enumerate(partial) if response.finish_reason == "interrupted"]
        rest = thread.generate([going_on(asked[index], partial[index]) for index in unfinished])
        for index, after in zip(unfinished, rest, strict=True):
            assert [*partial[index].tokens, *after.tokens] == whole[index].tokens.tolist()


@pytest.mark.parametrize("tensor", [1, 2], ids=["two engines", "one engine cut in two"])
def test_two_ranks_generate_what_one_does(tensor: int, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "old", hidden_size=128)
    make_tiny_model(tmp_path / "new", hidden_size=128, seed=1)
    start(2, _rank, tensor, str(tmp_path))


ENVIRONMENT = """
class Echo:
    def reset(self, row):
        self.turns = 0
        return [{"role": "user", "content": str(row["ground_truth"])}], {}

    def step(self, message):
        self.turns += 1
        return [{"role": "user", "content": message["content"][:2]}], 1.0, self.turns == 3, False, {}
"""


def _episodes(rank: int, folder: str) -> None:
    from hybridflow.workers.rollout import RolloutWorker

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/episodes", rank=rank, world_size=2)
    greedy = Sampling(temperature=0.0, max_tokens=100)
    told = []
    for engine, layout in (("vllm", Layout(tensor=2)), ("torch", Layout(data=2))):
        settings = Config(
            model=ModelConfig(path=f"{folder}/old"),
            data=DataConfig(max_prompt_tokens=32, max_response_tokens=100),
            environment=EnvironmentConfig(path=f"{folder}/echo.py", max_turn_tokens=8),
            rollout=RolloutConfig(engine=engine, tensor_parallel=layout.tensor, max_num_seqs=32),
        )
        worker = RolloutWorker(settings, RankContext(role="rollout", rank=rank, layout=layout, device=torch.device("cpu")))
        assert (worker.environment is None) == (rank == 1 and engine == "vllm"), "the first rank has the environments"
        asked = episode_rows([str(number) for number in range(12)])
        worker.submit(asked, sampling=greedy)
        for _ in range(3):
            time.sleep(0.05 * (1 + rank))
            worker.interrupt()
            worker.resume()
        worker.load_weights(weights_of(f"{folder}/new"))
        worker.take_finished(12)
        answered = worker.generate(asked, sampling=greedy)
        if worker.environment is not None:
            assert (answered["environment/turns"] == 3).all() and not answered["episode_failed"].any()
            told.append([tokens.tolist() for tokens in answered.tokens("response")])
        worker.close()
    assert rank == 1 or told[0] == told[1], "an engine cut in two says what a whole one does"


def test_an_engine_cut_in_two_plays_episodes(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "old", hidden_size=128)
    make_tiny_model(tmp_path / "new", hidden_size=128, seed=1)
    (tmp_path / "echo.py").write_text(ENVIRONMENT)
    start(2, _episodes, str(tmp_path))
