"""An address that is no Ray is told soon, whatever listens there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hybridflow.config.schema import Config, RunConfig
from hybridflow.controller import cluster
from hybridflow.errors import PlacementError

SETTINGS = b"\0\0\0\4\0\0\0\0\0"
"""What a server of HTTP/2 says first."""


@contextmanager
def listening(says: bytes | None, closes: bool) -> Iterator[str]:
    """A server that answers what it is sent with `says`; None keeps silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(1024)
            if says is not None:
                connection.sendall(says)
            if not closes:
                time.sleep(5)
            connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def enter(address: str | None) -> None:
    with cluster.cluster(Config(run=RunConfig(ray_address=address))):
        raise AssertionError("there is a cluster")


@pytest.mark.parametrize(
    ("says", "closes", "expected"),
    [
        (None, False, "it accepts connections and says nothing"),
        (None, True, "what listens there is something else, it says b'nothing"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "what listens there is something else, it says b'HTTP/1.1 400"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False, "what listens there is something else, it says b'SSH-2.0"),
    ],
)
def test_what_is_no_cluster_is_told(says: bytes | None, closes: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "JOIN_TIMEOUT_S", 1.0)
    started = time.monotonic()
    with listening(says, closes) as address, pytest.raises(PlacementError) as raised:
        enter(address)
    assert f"no Ray cluster answers at {address}: {expected}" in str(raised.value)
    assert time.monotonic() - started < 20


def test_a_server_that_speaks_what_ray_speaks_is_left_to_ray() -> None:
    with listening(SETTINGS, closes=False) as address:
        cluster._check_reachable(address)


def test_ray_that_does_not_come_up_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(cluster.ray, "init", lambda *_, **__: time.sleep(5))
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_check_reachable", lambda address: None)
    started = time.monotonic()
    with pytest.raises(Exception, match=r"connecting to Ray has not ended after 0\.5 s: .*_join \(cluster\.py"):
        enter("127.0.0.1:1")
    assert time.monotonic() - started < 5


def test_a_plain_exception_of_ray_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise Exception("the GCS has become overloaded")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "init", fails)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(PlacementError, match="could not start Ray on this machine: the GCS has become overloaded"):
        enter(None)
