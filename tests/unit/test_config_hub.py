"""What is told of models on the hub, by real requests to a hub of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import NamedTuple

import pytest

from tests.unit.config_cases import model_folder, right_run

PROGRAM = """
import logging, sys
logging.basicConfig(format="warning: %(message)s", stream=sys.stdout)
from hybridflow.config import rules_hub
from hybridflow.config.load import load_config
from hybridflow.errors import ConfigError
rules_hub.TIMEOUT_S, rules_hub.PAUSE_S = 1.0, 0.0
try:
    load_config(None, sys.argv[1:], asks_hub=True)
except ConfigError as error:
    print("mistakes:", *(f"{mistake}" for mistake in error.errors), sep="\\n")
print("asked" if "huggingface_hub" in sys.modules else "did not ask")
"""


class Hub(NamedTuple):
    """A hub that knows a few names, and the paths that it was asked for."""

    address: str
    asked: list[str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Has org/name; answers for org/slow after the test, with 503 for org/busy, and that it knows no others."""
    asked: list[str] = []
    is_over = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            if "org/slow" in self.path:
                is_over.wait(20)
            is_tokenizer = "org/words" in self.path
            known = {"org/name": (200, {"ETag": '"1"'}), "org/busy": (503, {})}
            absent = (404, {"X-Error-Code": "EntryNotFound" if is_tokenizer else "RepoNotFound"})
            status, headers = next((answer for name, answer in known.items() if name in self.path), absent)
            self.send_response(status)
            for header, value in {"Content-Length": "2", "X-Repo-Commit": "1" * 40, **headers}.items():
                self.send_header(header, value)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield Hub(f"http://127.0.0.1:{server.server_port}", asked)
    is_over.set()
    server.shutdown()
    server.server_close()


def told(folder: Path, *overrides: str, hub: str, **environment: str) -> str:
    """What loading a configuration says, in a process that looks for the hub at an address, with a cache of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy") and key != "RAY_ADDRESS"}
    settings = {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-c", PROGRAM, *right_run(folder), *overrides]
    done = subprocess.run(command, env=clean | settings, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fill_cache(folder: Path, *, without: str = "") -> None:
    """The cache of the hub as a download of org/name leaves it."""
    model = folder / "cache" / "models--org--name"
    (model / "snapshots").mkdir(parents=True)
    model_folder(model / "snapshots" / ("1" * 40), without=without)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("1" * 40)


NOWHERE = "http://127.0.0.1:9"  # the port of a service that throws everything away, and that nobody runs


def test_a_model_that_the_hub_has_is_asked_for_once_and_not_loaded(tmp_path: Path, hub: Hub) -> None:
    assert told(tmp_path, hub=hub.address) == "asked\n"
    assert hub.asked == ["HEAD /org/name/resolve/main/config.json"]


def test_a_local_folder_asks_nobody(tmp_path: Path, hub: Hub) -> None:
    model = model_folder(tmp_path / "model")
    assert "mistakes" not in told(tmp_path, f"model.path={model}", hub=hub.address)
    assert not hub.asked


def test_a_hub_that_cannot_be_reached_is_told_with_the_other_mistakes_and_what_to_do(tmp_path: Path) -> None:
    started = time.monotonic()
    text = told(tmp_path, "run.seed=x", hub=NOWHERE)
    assert "run.seed: found 'x'" in text and f"model.path: 'org/name' is no folder, {NOWHERE} cannot be reached (" in text
    assert (
        f"the cache {tmp_path / 'cache'} holds no config.json of it. Give a local folder; or where there is a network" in text
    )
    assert "`hf download org/name`, and set HF_HUB_OFFLINE=1" in text
    assert time.monotonic() - started < 20


def test_a_filled_cache_does_without_the_hub(tmp_path: Path) -> None:
    fill_cache(tmp_path)
    text = told(tmp_path, hub=NOWHERE)
    assert (
        text.startswith("warning: ") and "its cache holds 'org/name'. Set HF_HUB_OFFLINE=1" in text and "mistakes" not in text
    )
    assert told(tmp_path, hub=NOWHERE, HF_HUB_OFFLINE="1") == "asked\n"


@pytest.mark.parametrize("without", ["config.json", "model.safetensors"])
def test_offline_a_cache_that_lacks_something_is_a_mistake(tmp_path: Path, without: str) -> None:
    fill_cache(tmp_path, without=without)
    text = told(tmp_path, hub=NOWHERE, HF_HUB_OFFLINE="1")
    lacking = "no config.json" if without == "config.json" else "no weights"
    assert f"HF_HUB_OFFLINE is set, and the cache {tmp_path / 'cache'} holds {lacking} of it" in text and "mistakes" in text


@pytest.mark.parametrize(("name", "said"), [("org/slow", "did not answer"), ("org/busy", "answered 503")])
def test_a_hub_that_is_slow_or_busy_refuses_no_run(tmp_path: Path, hub: Hub, name: str, said: str) -> None:
    text = told(tmp_path, f"model.path={name}", hub=hub.address)
    assert text.startswith("warning: ") and said in text and "mistakes" not in text


def test_a_model_that_the_hub_does_not_know_is_a_mistake(tmp_path: Path, hub: Hub) -> None:
    text = told(tmp_path, "critic.path=org/nmae", hub=hub.address)
    assert f"critic.path: 'org/nmae' is no folder, and {hub.address} knows no such model" in text and "HF_TOKEN" in text
    assert "model.path" not in text


def test_a_tokenizer_needs_no_model(tmp_path: Path, hub: Hub) -> None:
    assert told(tmp_path, "model.tokenizer=org/words", hub=hub.address) == "asked\n"
    assert "holds no config.json. Name a model" in told(tmp_path, "model.path=org/words", hub=hub.address)


def test_where_a_cluster_is_joined_only_its_ranks_need_the_hub(tmp_path: Path) -> None:
    text = told(tmp_path, "run.ray_address=head:6379", hub=NOWHERE)
    assert (
        "mistakes" not in text and "warning: command line: model.path: on this machine (the ranks look where they run)" in text
    )


def test_a_config_is_loaded_without_a_network_unless_it_is_asked_for(tmp_path: Path, hub: Hub) -> None:
    program = PROGRAM.replace("asks_hub=True", "asks_hub=False")
    environment = os.environ | {"HF_ENDPOINT": hub.address}
    command = [sys.executable, "-c", program, *right_run(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "did not ask\n" and not hub.asked
