"""Scoring while others still generate: earlier, and otherwise the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridflow.batch import Batch, Ragged
from hybridflow.config.schema import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig
from hybridflow.controller.streaming import Generation
from hybridflow.errors import ConfigError, EngineError, RequestRefusedError, RewardError
from hybridflow.parallel.layout import Layout
from hybridflow.rollout.base import Engine, EngineSpec, Request, Response
from hybridflow.workers.base import RankContext
from hybridflow.workers.remote import remote
from hybridflow.workers.respond import NUM_PARTS, respond
from hybridflow.workers.reward import RewardWorker
from hybridflow.workers.rollout import RolloutWorker
from tests.unit.local_groups import LocalDispatcher

LENGTH_AS_REWARD = """
def compute_score(reward_input):
    size = len(reward_input["response"])
    return {"overall": size, "even": 1} if size % 2 == 0 else {"overall": size}
"""
ROWS_AS_REWARD = """
REWARD_TYPE = "batch"
def compute_score(reward_inputs):
    return [len(reward_inputs) + position / 100 for position, _ in enumerate(reward_inputs)]
"""
REFUSES_ONE = """
from hybridflow.controller.streaming import Generation
from hybridflow.errors import ConfigError, EngineError, RequestRefusedError, RewardError
def compute_score(reward_input):
    if len(reward_input["response"]) == 1: raise RewardError("one character is too short to judge")
    return 1.0
"""
may_end = threading.Event()


class SteppingEngine(Engine):
    """Answers a request with as many characters as its prompt's first token says, one per step."""

    def __init__(self, spec: EngineSpec):
        super().__init__(spec)
        self.running: dict[int, list[int]] = {}

    def add(self, request: Request) -> None:
        self.running[request.id] = [int(request.prompt[0]), 0]

    def step(self) -> list[Response]:
        for entry in self.running.values():
            entry[1] += 1
        ended = [number for number, (length, steps) in self.running.items() if steps >= length]
        return [self._response(number, self.running.pop(number)[0]) for number in ended]

    def _response(self, number: int, length: int) -> Response:
        log_probs = np.full(length, -1.0, np.float32)
        return Response(id=number, tokens=np.arange(4, 4 + length, dtype=np.int32), log_probs=log_probs, finish_reason="stop")

    @property
    def num_unfinished(self) -> int:
        return len(self.running)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.check_idle()

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())


class HeldEngine(SteppingEngine):
    """Keeps the last response back until `may_end` is set."""

    def step(self) -> list[Response]:
        if len(self.running) == 1 and not may_end.wait(5):
            raise RuntimeError("nothing was scored while the last response was generated")
        return super().step()


class OwnReward(RewardWorker):
    """Scores by comparing rows, which the built-in role does not do."""

    scores_whole_batches = True

    @remote("split_by_data_rank")
    def score(self, batch: Batch) -> Batch:
        return Batch({"reward": np.full(len(batch), len(batch), np.float32)})


class RefusingEngine(SteppingEngine):
    """Refuses prompts that begin with 7."""

    def add(self, request: Request) -> None:
        if request.prompt[0] == 7:
            raise EngineError("seven is not generated here")
        super().add(request)


Start = Callable[..., tuple[RolloutWorker, RewardWorker]]


@pytest.fixture
def start(tiny_model: str, tmp_path: Path) -> Iterator[Start]:
    """Groups of rollout and reward on threads; `start(source)` takes the text of a reward function's file."""
    begun: list[RolloutWorker | RewardWorker] = []

    def start(
        source: str = LENGTH_AS_REWARD,
        *,
        engine: type[Engine] = SteppingEngine,
        layout: Layout | None = None,
        scorer: type[RewardWorker] = RewardWorker,
        scores_on: str = "scoring",
    ) -> tuple[RolloutWorker, RewardWorker]:
        (tmp_path / "reward.py").write_text(source)
        config = Config(
            model=ModelConfig(path=tiny_model),
            data=DataConfig(max_prompt_tokens=4, max_response_tokens=20),
            rollout=RolloutConfig(engine=f"{__name__}:{engine.__name__}"),
            reward=RewardConfig(path=str(tmp_path / "reward.py"), num_processes=1),
        )
        cut = layout or Layout()
        rollout = [RolloutWorker(config, context("rollout", rank, cut)) for rank in range(cut.num_ranks)]
        reward = scorer(config, context("reward", 0, Layout()))
        begun.extend([*rollout, reward])
        generating = RolloutWorker.group(LocalDispatcher(rollout, cut, pool_name="main"))
        return generating, scorer.group(LocalDispatcher([reward], Layout(), pool_name=scores_on))

    yield start
    for worker in begun:
        worker.close()


def context(role: str, rank: int, layout: Layout) -> RankContext:
    return RankContext(role=role, rank=rank, layout=layout, device=torch.device("cpu"))


def rows(lengths: Iterable[int]) -> Batch:
    """Prompts that SteppingEngine answers with responses of `lengths`."""
    tokens = [[length] for length in lengths]
    count = len(tokens)
    columns: dict[str, object] = {name: ["x"] * count for name in ("ground_truth", "data_source", "extra_info", "prompt_text")}
    batch = Batch.from_columns({"prompt": Ragged.from_rows(tokens, np.int32), **columns})
    return batch.with_columns(seed=np.arange(count), prompt_tokens=np.ones(count, np.int64))


def called(worker: RolloutWorker | RewardWorker, method: str) -> int:
    return dispatcher(worker).called.count(method)


def dispatcher(worker: RolloutWorker | RewardWorker) -> LocalDispatcher:
    assert isinstance(worker.dispatcher, LocalDispatcher)
    return worker.dispatcher


def hold_last_response_until_something_is_scored(reward: RewardWorker) -> None:
    may_end.clear()
    dispatcher(reward).after = lambda method: may_end.set() if method == "score" else None


# One response is longer than all others.
SHUFFLED = [*(int(length) for length in np.random.default_rng(0).permutation(np.arange(40) % 17 + 1)), 19]


@pytest.mark.parametrize("layout", [Layout(), Layout(data=2), Layout(data=2, tensor=2)], ids=str)
@pytest.mark.parametrize("lengths", [SHUFFLED, [3], [5, 5, 1]], ids=["many", "one", "fewer than parts"])
def test_rows_and_scores_are_those_of_one_after_the_other(start: Start, layout: Layout, lengths: list[int]) -> None:
    rollout, reward = start(layout=layout)
    given = rows(lengths)
    expected = given.join(rollout.generate(given))
    expected = expected.join(reward.score(expected))
    given = given.with_columns(call=np.zeros(len(given), np.int64))
    found = respond(given, rollout, reward).without(["call"])
    assert set(found.names) == set(expected.names)
    for name in expected.per_row:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
        assert found[name].dtype == expected[name].dtype
    assert found["reward"].tolist() == lengths
    for name in ("prompt", "response", "rollout_log_probs"):
        assert [row.tolist() for row in found.tokens(name)] == [row.tolist() for row in expected.tokens(name)]
    assert found.objects("response_text") == expected.objects("response_text")
    assert 1 <= called(rollout, "take_finished") <= NUM_PARTS, "the groups went one after the other both times"


def test_the_first_scores_are_there_before_the_last_response(start: Start) -> None:
    rollout, reward = start(engine=HeldEngine)
    hold_last_response_until_something_is_scored(reward)
    answered = respond(rows(SHUFFLED), rollout, reward)
    assert answered["reward"].tolist() == answered["response_tokens"].tolist() == SHUFFLED


def test_of_collects_that_run_together_a_refused_row_fails_its_own_alone(start: Start) -> None:
    rollout, _ = start(engine=RefusingEngine)
    rollout.interrupt()
    generation = Generation(rollout, on_failure=lambda error: None)
    given = {
        number: rows(lengths).with_columns(group=np.full(2, number)) for number, lengths in enumerate([(3, 4), (7, 5), (2, 2)])
    }
    answers = {number: generation.generate(batch) for number, batch in given.items()}
    generation.resume()
    assert [answers[number].result(20)["response_tokens"].tolist() for number in (0, 2)] == [[3, 4], [2, 2]]
    with pytest.raises(RequestRefusedError, match="seven is not generated here"):
        answers[1].result(20)
    later = generation.generate(rows([6]).with_columns(group=np.array([9])))
    assert later.result(20)["response_tokens"].tolist() == [6]
    assert "refused" not in later.result()
    generation.close()


def test_a_refused_row_is_told_to_whoever_asks_for_all_of_them(start: Start) -> None:
    for respond_to in (lambda given, rollout, _: rollout.generate(given), respond):
        rollout, reward = start(engine=RefusingEngine)
        with pytest.raises(EngineError, match="seven is not generated here"):
            respond_to(rows([3, 7, 2]), rollout, reward)


def test_slow_scoring_gets_more_rows_at_once_instead_of_a_queue(start: Start) -> None:
    generated = threading.Event()
    rollout, reward = start(engine=HeldEngine)
    may_end.clear()

    def score_until_all_is_generated(method: str) -> None:
        if method == "score":
            may_end.set()
            assert generated.wait(20)

    dispatcher(reward).before = score_until_all_is_generated
    rollout_calls = dispatcher(rollout)
    rollout_calls.after = lambda method: generated.set() if rollout_calls.workers[0].rows.num_left == 0 else None
    scored = respond(rows(SHUFFLED), rollout, reward)
    assert scored["reward"].tolist() == SHUFFLED
    # The first part, and all that finished meanwhile.
    assert called(reward, "score") == 2


def test_a_batch_function_sees_the_rows_of_a_step_at_once_and_in_their_order(start: Start) -> None:
    rollout, reward = start(ROWS_AS_REWARD)
    scored = respond(rows(SHUFFLED), rollout, reward)
    np.testing.assert_allclose(scored["reward"], 41 + np.arange(41) / 100, rtol=1e-6)


def test_a_reward_role_that_compares_rows_sees_those_of_a_step_at_once(start: Start) -> None:
    rollout, reward = start(scorer=OwnReward)
    assert respond(rows(SHUFFLED), rollout, reward)["reward"].tolist() == [41.0] * 41


def test_on_a_shared_pool_scores_follow_the_last_response_in_one_call(start: Start) -> None:
    rollout, reward = start(scores_on="main")
    answered = respond(rows(SHUFFLED), rollout, reward)
    assert answered["reward"].tolist() == answered["response_tokens"].tolist() == SHUFFLED
    assert called(rollout, "take_finished") == 0
    assert called(reward, "score") == 1


def test_no_call_follows_one_that_failed(start: Start) -> None:
    rollout, reward = start(REFUSES_ONE, engine=HeldEngine)
    hold_last_response_until_something_is_scored(reward)
    with pytest.raises(RewardError, match="one character is too short"):
        respond(rows(SHUFFLED), rollout, reward)
    assert called(reward, "score") == 1


def test_a_class_that_replaces_score_gets_whole_batches_and_one_that_replaces_generate_says_what_it_needs() -> None:
    class Replaces(RewardWorker):
        def score(self, batch: Batch) -> Batch:  # type: ignore[override]
            return batch

    assert Replaces.scores_whole_batches and not RewardWorker.scores_whole_batches
    with pytest.raises(ConfigError, match="Set answers_row_by_row on it"):

        class AlsoForgetful(RolloutWorker):
            def generate(self, batch: Batch) -> Batch:  # type: ignore[override]
                return batch
