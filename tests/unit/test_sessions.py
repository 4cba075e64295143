"""Agents behind an OpenAI-compatible address, and conversations whose history is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridflow.batch import Ragged
from hybridflow.errors import EpisodeError
from hybridflow.workers.actor import ActorWorker
from hybridflow.workers.microbatches import split_at_histories
from hybridflow.workers.rollout import RolloutWorker
from tests.toy import make_tiny_tokenizer
from tests.training_rows import context_of, training_config
from tests.unit.episodes import episode_config, episode_rows, worker_of

TOKENIZER = make_tiny_tokenizer()
REWRITES = """
class Forgets:
    def reset(self, row):
        self.turns = 0
        return row["messages"], {}

    def step(self, message):
        self.turns += 1
        if self.turns == 2:
            return [{"role": "user", "content": "so far: x"}], 0.0, False, False, {"new_history": True}
        return [{"role": "user", "content": "more"}], 1.0, self.turns == 3, False, {}
"""
ASKS = """
import json, urllib.request

def post(address, body):
    data = json.dumps({"model": "policy", **body}).encode()
    request = urllib.request.Request(address + "/chat/completions", data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))["choices"][0]["message"]
"""
PLAIN_AGENT = (
    ASKS
    + """
def run(row, address):
    messages = list(row["messages"])
    for _ in range(3):
        said = post(address, {"messages": messages, "temperature": 0.3})
        messages += [said, {"role": "user", "content": [{"type": "text", "text": "go"}, {"type": "text", "text": " on"}]}]
    return 2.5, {"asked": 3}
"""
)
SUMMARISING_AGENT = (
    ASKS
    + """
class Agent:
    def run(self, row, address):
        first = post(address, {"messages": row["messages"]})
        second = post(address, {"messages": [{"role": "user", "content": "sum"}]})
        return 1
"""
)
Start = Callable[..., RolloutWorker]


@pytest.fixture
def start(tiny_model: str, tmp_path: Path) -> Iterator[Start]:
    begun: list[RolloutWorker] = []

    def start(source: str, **environment: object) -> RolloutWorker:
        file = tmp_path / "agent.py"
        file.write_text(source)
        begun.append(worker_of(episode_config(tiny_model, file, **environment)))
        return begun[-1]

    yield start
    for worker in begun:
        worker.close()


def test_what_follows_a_new_history_is_sampled_and_learned_from_without_the_old_one(start: Start, tiny_model: str) -> None:
    answered = start(REWRITES).generate(episode_rows(["a", "bc"]))
    assert answered["environment/histories"].tolist() == [2, 2] and answered["episode_reward"].tolist() == [2, 2]
    for row, (begin,) in enumerate(answered.tokens("history_starts")):
        tokens, mask = answered.tokens("response")[row], answered.tokens("loss_mask")[row]
        opening = TOKENIZER.encode("user: so far: x\nassistant: ")
        assert tokens[begin : begin + len(opening)].tolist() == opening and not mask[begin : begin + len(opening)].any()
        assert mask[begin - 1] and mask[begin + len(opening)]
    actor = ActorWorker(training_config(tiny_model, tokens_per_microbatch=512), context_of("actor"))
    mask = answered.tokens("loss_mask").values
    trained = actor.log_probs(answered).tokens("log_probs").values[mask]
    sampled = answered.tokens("rollout_log_probs").values[mask]
    np.testing.assert_allclose(trained, sampled, atol=1e-3)
    blind = actor.log_probs(answered.without(["history_starts"])).tokens("log_probs").values[mask]
    assert np.abs(blind - sampled).max() > 0.05, "with the old history before it, it would be another distribution"


def test_a_history_begins_a_row_of_its_own_in_attention() -> None:
    prompt, response = Ragged.from_rows([[1, 2], [9]], np.int32), Ragged.from_rows([[3, 4, 5, 6], [7, 8]], np.int32)
    mask, starts = np.array([True, True, False, True, False, True]), Ragged.from_rows([[2], []], np.int64)
    prompts, responses, masks = split_at_histories(prompt, response, mask, starts)
    assert [row.tolist() for row in prompts] == [[1, 2], [5], [9]]
    assert [row.tolist() for row in responses] == [[3, 4], [6], [7, 8]]
    assert masks.tolist() == [True, True, True, False, True]


def test_an_agent_plays_an_episode_by_its_requests(start: Start) -> None:
    answered = start(PLAIN_AGENT).generate(episode_rows(["a", "b", "c"]))
    assert answered["episode_reward"].tolist() == [2.5] * 3 and not answered["episode_failed"].any()
    assert answered["environment/turns"].tolist() == [3] * 3 and answered["environment/asked"].tolist() == [3] * 3
    assert answered["environment/histories"].tolist() == [1] * 3, "each request goes on from the last answer"
    between = TOKENIZER.encode("\nuser: go on\nassistant: ")
    for tokens, mask in zip(answered.tokens("response"), answered.tokens("loss_mask"), strict=True):
        assert tokens[~mask].tolist() == between * 2


def test_an_agent_that_rewrites_its_history_begins_a_new_one(start: Start) -> None:
    answered = start(SUMMARISING_AGENT).generate(episode_rows(["a"]))
    assert answered["environment/histories"].tolist() == [2] and answered["episode_reward"].tolist() == [1]
    (begin,) = answered.tokens("history_starts")[0]
    assert answered.tokens("response")[0][begin:].tolist()[:5] == TOKENIZER.encode("user:")


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('lost')",
        "return 1.0",
        "import time; time.sleep(60)",
        "post(address, {'messages': 3})",
        "post('http://x', {})",
    ],
)
def test_agents_that_fail_are_counted(start: Start, body: str) -> None:
    source = f"{ASKS}\ndef run(row, address):\n    if row['ground_truth'] == 'a':\n        {body}\n"
    source += "    post(address, {'messages': row['messages']})\n    return 1.0\n"
    answered = start(source, timeout_s=2.0).generate(episode_rows(["a", "b"]))
    assert answered["episode_failed"].tolist() == [True, False] and answered["episode_reward"].tolist() == [0, 1]


def test_an_agent_without_an_address_is_refused(start: Start) -> None:
    with pytest.raises(EpisodeError, match=r"an agent is run\(row, address\)"):
        start("def run(row):\n    return 1.0\n")


def test_a_client_of_openai_is_answered_also_in_a_stream(start: Start) -> None:
    pytest.importorskip("openai")
    source = """
from openai import OpenAI

def run(row, address):
    client = OpenAI(base_url=address, api_key="none")
    assert [model.id for model in client.models.list()] == ["policy"]
    first = client.chat.completions.create(model="policy", messages=row["messages"]).choices[0].message
    messages = [*row["messages"], first, {"role": "user", "content": "on"}]
    chunks = client.chat.completions.create(model="policy", messages=messages, stream=True)
    parts = [chunk.choices[0].delta.content for chunk in chunks]
    assert parts == ["".join(parts)]
    return 1.0
"""
    answered = start(source).generate(episode_rows(["a"]))
    assert answered["episode_reward"].tolist() == [1] and answered["environment/histories"].tolist() == [1]
    assert answered["environment/turns"].tolist() == [2]
