"""Episodes on the rollout role: whose token is whose, what they are given for it, and environments that misbehave."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridflow.batch import Batch
from hybridflow.environments import under_way
from hybridflow.errors import EpisodeError
from hybridflow.workers.rollout import RolloutWorker, started_columns
from tests.toy import make_tiny_tokenizer
from tests.unit.episodes import episode_config, episode_rows, worker_of

TOKENIZER = make_tiny_tokenizer()
THREE_TURNS = """
class Ask:
    def __init__(self, turns=3):
        self.turns, self.taken = turns, 0

    def reset(self, row):
        self.truth = row["ground_truth"]
        return row["messages"], {}

    async def step(self, message):
        assert message["role"] == "assistant" and isinstance(message["content"], str)
        self.taken += 1
        done = self.taken == self.turns
        return [{"role": "user", "content": f"more {self.truth}"}], self.taken, done, False, {"taken": self.taken}
"""
MISBEHAVING = """
import collections, ctypes, os, sys, time

import numpy as np

class Text(str):
    pass

class Unwilling:
    def __reduce__(self):
        raise RuntimeError("not from this process")

OBJECTS = {"object": lambda: 1, "pointer": ctypes.pointer(ctypes.c_int(3)), "own class": Text, "unwilling": Unwilling()}
NEAR_JSON = {"ids": np.arange(3), "share": np.float32(0.5), "own": Text("x"), "more": collections.UserDict(a=(1, {2}))}

class Odd:
    def reset(self, row):
        self.kind = row["ground_truth"]
        if self.kind == "raise in reset": raise KeyError("no such level")
        return row["messages"], {}

    def step(self, message):
        match self.kind:
            case "raise": raise ZeroDivisionError("in the third room")
            case "long": raise ValueError("x" * 10**7)
            case "hang": time.sleep(3600)
            case "spin":
                while True: pass
            case "nothing": return None
            case "no messages": return [], 0.0, False, False, {}
            case "nan": return [], float("nan"), True, False, {}
            case "large": return [], 1e300, True, False, {}
            case "said yes": return [], 1.0, "False", False, {}
            case "info": return [], 1.0, True, False, ["solved"]
            case "taken name": return [], 1.0, True, False, {"turns": 7}
            case "half a character": return [{"role": "user", "content": "\\ud800"}], 0.0, False, False, {}
            case "picture": return [{"role": "user", "content": [{"type": "image", "image": "x"}]}], 0.0, False, False, {}
            case "object" | "pointer" | "own class" | "unwilling":
                return [{"role": "user", "content": "on", "call": OBJECTS[self.kind]}], 0.0, False, False, {}
            case "own text": return [{"role": Text("user"), "content": Text("on"), **NEAR_JSON}], 0.0, False, False, {}
            case "socket": os.write(int(sys.argv[1]), b"\\0\\0\\0\\3abc")
            case "huge": return [{"role": "user", "content": "x" * 30_000_000}], 1.0, False, False, {}
            case "tools": return [{"role": "user", "content": "on"}], 0.0, False, False, {"new_history": True, "tools": "abc"}
            case "exit": os._exit(7)
            case "endless": return [{"role": "user", "content": "on"}], 0.0, False, False, {}
        return [], 1.0, True, False, {}
"""
Start = Callable[..., RolloutWorker]


@pytest.fixture
def start(tiny_model: str, tmp_path: Path) -> Iterator[Start]:
    """`start(source, **keys of environment)`: a rollout role whose environments are of the class in `source`."""
    begun: list[RolloutWorker] = []

    def start(source: str = THREE_TURNS, **environment: object) -> RolloutWorker:
        file = tmp_path / "environment.py"
        file.write_text(source)
        begun.append(worker_of(episode_config(tiny_model, file, **environment)))
        return begun[-1]

    yield start
    for worker in begun:
        worker.close()


def as_lists(batch: Batch, name: str) -> list[list[float]]:
    return [row.tolist() for row in batch.tokens(name)]


def test_an_episode_is_the_conversation_in_tokens_and_its_mask_says_who_spoke(start: Start) -> None:
    answered = start().generate(episode_rows(["a", "b"]))
    for row, (tokens, mask) in enumerate(zip(answered.tokens("response"), answered.tokens("loss_mask"), strict=True)):
        content = "ab"[row]
        assert answered.objects("prompt_text")[row] == f"user: {content}\nassistant: "
        # The tiny template ends a turn by a new line, which the policy has not sampled, and is: role, colon, content, new line.
        between = TOKENIZER.encode(f"\nuser: more {content}\nassistant: ")
        appended = tokens[~mask].tolist()
        assert appended == between * 2
        conversation = answered.objects("conversation")[row]
        said = [message["content"] for message in conversation if message["role"] == "assistant"]
        assert TOKENIZER.decode(tokens[mask], skip_special_tokens=True) == "".join(said)
    assert answered["loss_tokens"].tolist() == [mask.sum() for mask in answered.tokens("loss_mask")]
    assert answered["response_tokens"].tolist() == answered.tokens("loss_mask").lengths.tolist()
    assert answered["environment/turns"].tolist() == [3, 3] and answered["environment/taken"].tolist() == [3, 3]
    assert not answered["truncated"].any()


def test_tokens_of_an_episode_are_sampled_with_the_conversation_before_them(start: Start, tiny_model: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    answered = start().generate(episode_rows(["a"]))
    prompt, response = (answered.tokens(name)[0].tolist() for name in ("prompt", "response"))
    mask, found = answered.tokens("loss_mask")[0], answered.tokens("rollout_log_probs")[0]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].detach().numpy()
    np.testing.assert_allclose(found[mask], expected[mask], atol=1e-4)
    assert (found[~mask] == 0).all()
    assert (
        as_lists(answered, "policy_versions")[0][1::2] == [mask.sum()]
        or sum(as_lists(answered, "policy_versions")[0][1::2]) == mask.sum()
    )


def test_the_reward_is_the_sum_over_turns_or_stands_at_the_last_token_of_each(start: Start) -> None:
    answered = start(rewards="turn").generate(episode_rows(["a"]))
    assert answered["episode_reward"].tolist() == [1 + 2 + 3]
    rewards, mask = answered.tokens("token_rewards")[0], answered.tokens("loss_mask")[0]
    last = [index for index in range(len(mask)) if mask[index] and (index + 1 == len(mask) or not mask[index + 1])]
    assert np.flatnonzero(rewards).tolist() == last and rewards[last].tolist() == [1, 2, 3]


def test_episodes_repeat_and_do_not_depend_on_those_beside_them(start: Start) -> None:
    worker, rows = start(), episode_rows(["a", "b", "c", "d"])
    whole = as_lists(worker.generate(rows), "response")
    assert as_lists(worker.generate(rows.select([2])), "response") == [whole[2]]


@pytest.mark.parametrize(
    ("limits", "turns"), [({"max_turns": 2}, 2), ({"max_turn_tokens": 90}, 2), ({"options": {"turns": 1}}, 1)], ids=str
)
def test_an_episode_ends_at_its_limits(start: Start, limits: dict[str, object], turns: int) -> None:
    rows = episode_rows(["a", "b"])
    answered = start(**limits).generate(rows)
    assert answered["response_tokens"].max() <= 200
    if "max_turn_tokens" in limits:  # ends of sequence come early in some
        assert answered["environment/turns"].max() <= 3
    else:
        assert answered["environment/turns"].tolist() == [turns] * 2
        assert answered["truncated"].all() == ("max_turns" in limits)


KINDS = ["fine", "raise", "raise in reset", "nothing", "no messages", "nan", "fine", "endless", "fine"]


def test_what_an_environment_does_wrong_costs_its_own_episode_alone(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    worker = start(MISBEHAVING, max_turns=4, failure_reward=-0.5)
    answered = worker.generate(episode_rows(KINDS))
    failed = [kind not in ("fine", "endless") for kind in KINDS]
    assert answered["episode_failed"].tolist() == failed
    assert answered["episode_reward"].tolist() == [{"fine": 1.0, "endless": 0.0}.get(kind, -0.5) for kind in KINDS]
    assert [count > 0 for count in answered["loss_tokens"].tolist()] == [not bad for bad in failed]
    assert (answered["response_tokens"] > 0).all()
    endless = KINDS.index("endless")
    assert answered["environment/turns"][endless] == 4 and answered["truncated"][endless]
    assert len([line for line in caplog.messages if "an episode failed" in line]) == 1, "the first of a step is told"


WRONG = {
    "large": "it must be finite, and at most 1e+30",
    "said yes": "as terminated; expected True or False",
    "info": "as info; expected a dict",
    "taken name": "'turns', which is a metric of every environment",
    "half a character": "decode bytes with errors='replace'",
    "picture": "as the content of a message; expected text",
    "object": "step returned messages that are no JSON: a function",
    "pointer": "no JSON: a LP_c_int",
    "own class": "no JSON: a type",
    "unwilling": "no JSON: a Unwilling",
    "tools": "expected a list of JSON schemas",
}


def test_results_of_the_wrong_kind_are_failures_of_their_episode(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    worker = start(MISBEHAVING, failure_reward=-0.5)
    for kind, told in WRONG.items():
        worker.begin_step(1, 1)
        caplog.clear()
        answered = worker.generate(episode_rows(["fine", kind]))
        assert answered["episode_reward"].tolist() == [1.0, -0.5], kind
        assert told in caplog.text


def test_messages_of_the_files_own_classes_and_of_numpy_reach_the_policy_as_json(start: Start) -> None:
    answered = start(MISBEHAVING, max_turns=3).generate(episode_rows(["own text", "fine"]))
    assert not answered["episode_failed"].any()
    assert answered["environment/turns"].tolist() == [3, 1]


def test_a_process_whose_socket_gives_no_message_is_ended_and_the_cause_told(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker = start(MISBEHAVING)
    assert worker.generate(episode_rows(["socket"]))["episode_failed"].all()
    assert "since its socket gave no message: UnpicklingError" in caplog.text
    assert not worker.generate(episode_rows(["fine"] * 2))["episode_failed"].any()


def test_a_message_too_long_for_the_episode_ends_it_without_being_tokenised(start: Start) -> None:
    worker = start(MISBEHAVING, max_turns=4)
    started = time.monotonic()
    answered = worker.generate(episode_rows(["fine", "huge"]))
    assert time.monotonic() - started < 15
    assert answered["truncated"][1] and not answered["episode_failed"].any() and answered["environment/turns"][1] == 1


@pytest.mark.parametrize("kind", ["hang", "spin"])
def test_one_that_hangs_is_bounded_and_its_process_replaced(start: Start, kind: str) -> None:
    worker = start(MISBEHAVING, timeout_s=1.0)
    started = time.monotonic()
    answered = worker.generate(episode_rows([kind, "fine", kind, "fine"]))
    assert time.monotonic() - started < 20
    assert answered["episode_failed"].tolist() == [True, False, True, False]
    assert not worker.generate(episode_rows(["fine"] * 4))["episode_failed"].any()


def test_a_process_that_ends_takes_only_the_calls_with_it_that_it_was_in(start: Start) -> None:
    worker = start(MISBEHAVING)
    failed = worker.generate(episode_rows(["exit", "fine", "fine"]))["episode_failed"]
    assert failed[0]
    assert not worker.generate(episode_rows(["fine"] * 4))["episode_failed"].any()


def test_what_is_said_of_a_failure_is_bounded(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    assert start(MISBEHAVING).generate(episode_rows(["long", "fine"]))["episode_failed"].tolist() == [True, False]
    (said,) = [line for line in caplog.messages if "an episode failed" in line]
    assert len(said) < 6000 and 'raise ValueError("x" * 10**7)' in said


def test_where_all_fail_the_run_ends_and_says_why(start: Start) -> None:
    worker = start(MISBEHAVING)
    with pytest.raises(EpisodeError, match=r"have all failed(.|\n)*in the third room"):
        worker.generate(episode_rows(["raise"] * under_way.MAX_FAILURES_IN_A_ROW))


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import nowhere", "does not import: ModuleNotFoundError"),
        ("x = 1", "has no class with reset and step"),
        ("class A:\n    def step(self, message): ...", "class A has no method reset"),
        ("class A:\n    def reset(self, row): ...\n    def step(self, m): ...\nclass B(A): ...", "the file has A, B"),
        (
            THREE_TURNS + "\n    def reset(self): ...\n    def __init__(self, level): ...",
            "missing a required argument: 'level'",
        ),
    ],
)
def test_a_class_that_cannot_be_used_is_refused_at_the_start(start: Start, source: str, problem: str) -> None:
    with pytest.raises(EpisodeError, match=problem):
        start(source)


def test_episodes_go_on_after_an_interruption(start: Start) -> None:
    worker, rows = start(), episode_rows(["a", "b", "c"])
    whole = as_lists(worker.generate(rows), "response")
    worker.submit(rows)
    worker.interrupt()
    held = worker.rows.unfinished()
    assert 0 < len(held) <= 3
    time.sleep(0.3)  # what environments answer meanwhile waits
    assert worker.rows.num_left == 3
    worker.resume()
    answered = worker.take_finished(3)
    assert answered["environment/turns"].tolist() == [3] * 3
    assert [len(row) for row in as_lists(answered, "response")] == [len(row) for row in whole]


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.1])
def test_episodes_go_on_after_a_restart_by_saying_again_what_they_had_said(start: Start, seconds: float) -> None:
    worker, rows = start(), episode_rows(["a", "b", "c"])
    worker.submit(rows)
    time.sleep(seconds)
    worker.interrupt()
    saved = started_columns(worker.rows.unfinished())
    worker.resume()
    expected = worker.take_finished(3)
    again = start()
    order = np.argsort(saved["position"])
    again.submit(rows.join(saved.select(order)))
    found = again.take_finished(3)
    for row, tokens in enumerate(saved.select(order).tokens("response")):
        assert found.tokens("response")[row][: len(tokens)].tolist() == tokens.tolist()
    assert found["episode_reward"].tolist() == [6.0] * 3
    assert as_lists(found, "response") == as_lists(expected, "response")
    ours, theirs = (batch.tokens("rollout_log_probs").values for batch in (found, expected))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert as_lists(found, "loss_mask") == as_lists(expected, "loss_mask")


def test_where_the_environment_answers_otherwise_the_rest_is_said_anew(start: Start) -> None:
    worker, rows = start(), episode_rows(["a"])
    worker.submit(rows)
    whole = worker.take_finished(1)
    said = Batch.from_columns(
        {name: whole.tokens(name) for name in ("response", "rollout_log_probs", "policy_versions", "loss_mask")}
    )
    other = start(THREE_TURNS.replace("more", "less"))
    other.submit(rows.join(said.with_columns(ended=np.array([1]))))
    found = other.take_finished(1)
    first = int(np.argmin(whole.tokens("loss_mask")[0]))
    assert found.tokens("response")[0][:first].tolist() == whole.tokens("response")[0][:first].tolist()
    assert "less a" in found.objects("response_text")[0] and "more a" not in found.objects("response_text")[0]
    assert found["environment/turns"].tolist() == [3]
