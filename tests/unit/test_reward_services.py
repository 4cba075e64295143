"""Judges and reward models behind an address: slow, wrong, refusing, broken and silent ones."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from hybridflow.config.schema import RewardConfig, RewardTerm
from hybridflow.errors import RewardError
from hybridflow.rewards.call import RewardInput
from hybridflow.rewards.process_pool import RewardPool
from hybridflow.rewards.results import Failure, Score
from hybridflow.rewards.scorer import Scorer
from tests.unit.test_rewards import given


class Stub(BaseHTTPRequestHandler):
    """Does what the text of the response, behind the last word `do`, says: a list of steps, one for each time it is asked."""

    asked: ClassVar[Counter[str]] = Counter()
    questions: ClassVar[list[dict]] = []
    at_once = most_at_once = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        text = body.rpartition("do ")[2].partition(";")[0]
        with Stub.lock:
            step = text.split(",")[min(Stub.asked[text], text.count(","))]
            Stub.asked[text] += 1
            Stub.questions.append({"path": self.path, "key": self.headers.get("authorization"), **json.loads(body)})
            Stub.at_once += 1
            Stub.most_at_once = max(Stub.most_at_once, Stub.at_once)
        try:
            self.behave(step)
        finally:
            with Stub.lock:
                Stub.at_once -= 1

    def behave(self, step: str) -> None:
        kind, _, argument = step.partition(" ")
        if kind == "wait":
            time.sleep(float(argument))
            kind = "good"
        if kind == "nothing":
            time.sleep(30)  # longer than anybody asks for
            return
        if kind == "hangup":
            self.connection.close()
            return
        if kind in ("drip", "flood"):
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):
                self.wfile.write(b" " * (1 << 20 if kind == "flood" else 1))
                time.sleep(0.1 if kind == "drip" else 0)
        status = int(argument) if kind == "status" else 200
        said = {"good": "Fine.\nScore: 8", "wrong": "I like it", "twice": "Score: 1 ... Score: 10"}.get(kind, "")
        answer: object = {"choices": [{"message": {"content": said}}], "score": 0.8, "data": [{"probs": [0.25]}]}
        content = b"<html>" if kind == "html" else json.dumps({"error": "x"} if kind == "error" else answer).encode()
        self.send_response(status)
        if argument == "429":
            self.send_header("retry-after", "0.3")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:
            """A client that has gone away is what is tested."""

    server = Server(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def asking(text: str) -> RewardInput:
    row = given(f"do {text};")
    row["messages"] = [{"role": "user", "content": "what is 2+2?"}]
    row["conversation"] = [*row["messages"], {"role": "assistant", "content": row["response"]}]
    return row


def judge(address: str, **options: object) -> Scorer:
    options = {"base_url": address, "model": "m", "timeout_s": 20, "retry_wait_s": 0.02, "max_retries": 2, **options}
    return Scorer(RewardConfig(name="judge", timeout_s=90, options=options))


def num_asked_of(behaviour: str, *, expected: int) -> int:
    """How often the stub was asked. It counts when it reads a request, which may be after the caller has given it up."""
    deadline = time.monotonic() + 20
    while Stub.asked[behaviour] < expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return Stub.asked[behaviour]


def scored(address: str, text: str, **options: object) -> Score | Failure:
    Stub.asked.clear()
    return judge(address, **options).begin(asking(text))()


@pytest.mark.parametrize(
    ("behaviour", "num_asked", "timeout_s"),
    [
        ("good", 1, 20),
        ("wait 0.2", 1, 20),
        ("status 429,good", 2, 20),
        ("status 500,status 503,good", 3, 20),
        ("nothing,good", 2, 2),
        ("wait 30,good", 2, 2),
        ("hangup,good", 2, 20),
        ("html,good", 2, 20),
    ],
)
def test_a_judge_is_asked_until_it_answers(address: str, behaviour: str, num_asked: int, timeout_s: float) -> None:
    assert scored(address, behaviour, timeout_s=timeout_s) == Score(0.8, {"overall": 0.8, "said": 8.0})
    assert Stub.asked[behaviour] == num_asked


@pytest.mark.parametrize(
    ("behaviour", "num_asked", "cause"),
    [
        ("status 500", 3, "answered 500.*after 3 attempts"),
        ("status 429", 3, "answered 429.*after 3 attempts"),
        ("nothing", 3, r"no answer within 0\.5 s.*after 3 attempts"),
        ("hangup", 3, "after 3 attempts"),
        ("drip", 3, r"no answer within 0\.5 s.*after 3 attempts"),
        ("flood", 1, "longer than 1 MiB"),
        ("html", 3, "is no JSON.*after 3 attempts"),
        ("status 401", 1, "answered 401"),
        ("wrong", 1, "gave no number.*it said 'I like it'"),
        ("error", 1, "is no chat completion: {'error': 'x'}"),
    ],
)
def test_a_judge_that_gives_no_score_fails_the_response_with_its_cause(
    address: str, behaviour: str, num_asked: int, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hybridflow.rewards.service.MOST_BYTES", 1 << 20)
    failure = scored(address, behaviour, timeout_s=0.5 if behaviour in ("nothing", "drip") else 20)
    assert isinstance(failure, Failure)
    with pytest.raises(AssertionError, match=cause):
        raise AssertionError(failure.cause)
    assert num_asked_of(behaviour, expected=num_asked) == num_asked


def test_a_service_that_says_when_to_come_again_is_obeyed(address: str) -> None:
    started = time.perf_counter()
    assert isinstance(scored(address, "status 429,good"), Score)
    assert time.perf_counter() - started > 0.3


def test_nobody_at_the_address_is_a_failure_with_its_cause() -> None:
    failure = scored("http://127.0.0.1:9/v1", "good")
    assert isinstance(failure, Failure) and "after 3 attempts" in failure.cause


def test_a_judge_gets_the_messages_what_the_template_names_and_the_key(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    scored(address, "good", api_key_env="MY_KEY", system="Be strict.", request={"max_tokens": 9, "temperature": 0.5})
    question = Stub.questions[-1]
    assert (question["path"], question["key"], question["model"]) == ("/v1/chat/completions", "Bearer secret", "m")
    assert (question["max_tokens"], question["temperature"]) == (9, 0.5)
    assert question["messages"][0] == {"role": "system", "content": "Be strict."}
    assert "[user]\nwhat is 2+2?\n\n[assistant]\ndo good;" in question["messages"][1]["content"]
    scored(address, "good", template="k=$extra_k truth=$ground_truth costs $$5: $response")
    assert Stub.questions[-1]["messages"] == [{"role": "user", "content": "k=1 truth=72 costs $5: do good;"}]
    with pytest.raises(RewardError, match=r"template asks for 'rubric'.*\$conversation"):
        scored(address, "good", template="$rubric")


def test_the_parser_and_the_scale_are_the_users(address: str) -> None:
    assert scored(address, "twice").reward == 1.0
    assert scored(address, "good", pattern=r"(Fine)\W+Score: (\d)").reason == "raised"
    assert scored(address, "good", scale=(5, 9)).reward == 0.75
    assert scored(address, "good", scale=(9, 10)).reward == 0.0


def test_many_responses_are_judged_at_once_and_a_bad_one_fails_alone(address: str) -> None:
    options = {"base_url": address, "model": "m", "timeout_s": 4.0, "retry_wait_s": 0.02, "max_retries": 1}
    pool = RewardPool(RewardConfig(name="judge", num_processes=2, concurrency=32, timeout_s=60, options=options))
    behaviours = [*["wait 1"] * 60, "status 500", "wrong", "hangup", "nothing"]
    started, Stub.most_at_once = time.perf_counter(), 0
    results = pool.score([asking(behaviour) for behaviour in behaviours])
    pool.close()
    assert [isinstance(result, Score) for result in results] == [*[True] * 60, *[False] * 4]
    assert time.perf_counter() - started < 45  # 60 times 1 s one after the other are 60 s
    assert 8 < Stub.most_at_once <= 80  # 64, and answers that were given up and that the stub has not noticed


def test_a_judge_beside_a_rule_is_weighted(address: str) -> None:
    options = {"base_url": address, "model": "m"}
    terms = (RewardTerm(name="gsm8k"), RewardTerm(name="judge", weight=0.5, options=options))
    score = Scorer(RewardConfig(functions=terms)).begin(asking("good"))()
    assert isinstance(score, Score) and score.reward == 0.4
    assert score.metrics["judge"] == 0.8 and score.metrics["gsm8k"] == 0.0


@pytest.mark.parametrize(
    ("options", "reward"), [({}, 0.8), ({"result": "data.0.probs.0"}, 0.25), ({"fields": {"input": "response"}}, 0.8)]
)
def test_a_reward_model_behind_an_address_scores(address: str, options: dict, reward: float) -> None:
    options = {"url": f"{address}/classify", "request": {"model": "rm"}, **options}
    found = Scorer(RewardConfig(name="http", options=options)).begin(asking("good"))()
    assert isinstance(found, Score) and found.reward == reward
    question = Stub.questions[-1]
    assert question["model"] == "rm"
    assert question["input"] == "do good;" if "fields" in options else question["conversation"][1]["role"] == "assistant"


def test_an_answer_without_a_score_says_what_it_is(address: str) -> None:
    options = {"url": f"{address}/score", "result": "scores.0"}
    failure = Scorer(RewardConfig(name="http", options=options)).begin(asking("good"))()
    assert isinstance(failure, Failure) and "has nothing at 'scores.0'" in failure.cause
