"""The Ray cluster of a run: started on this machine, or joined where one is named."""

from __future__ import annotations

import logging
import os
import platform
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker

from hybridflow import interrupts
from hybridflow.config.pools import cpu_slots_of_this_machine
from hybridflow.config.schema import Config
from hybridflow.controller.waiting import ended_after, wait_for_thread
from hybridflow.errors import CallTimeoutError, HybridflowError, PlacementError

logger = logging.getLogger("hybridflow")

JOIN_TIMEOUT_S = 10.0
"""For something to be said at the address of a cluster."""
CONNECT_TIMEOUT_S = 240.0
"""For a connection to Ray. It has limits of its own of up to two minutes."""
LAST_WORD_S = 30.0
"""After that limit, for whoever waits to say so; then the interpreter is not free."""
SHUTDOWN_TIMEOUT_S = 30.0
LOOK_EVERY_S = 1.0
HTTP2_SETTINGS = b"\x04"
"""The kind of the first frame on a connection."""
NO_WAIT_FOR_WORKERS = ("RAY_prestart_worker_first_driver", "0")
"""Otherwise a node connects this process when its first workers have come up: where Python hangs in these, `ray.init` does too,
and holds the interpreter meanwhile."""
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of what `ray job submit` runs."""


@contextmanager
def cluster(config: Config) -> Iterator[None]:
    """Ray, joined or started for the time of the block. A cluster that was started here is ended; a joined one stays.

    Where this process is connected to Ray already (a notebook, a test), that connection is used and kept.

    Raises:
        PlacementError: the cluster cannot be reached, or none can be started.
    """
    if ray.is_initialized():
        yield
        return
    address = config.run.ray_address or os.environ.get("RAY_ADDRESS")
    logger.info(f"joining the Ray cluster at {address}" if address else "starting Ray on this machine")
    doing = f"join the Ray cluster at {address!r}" if address else "start Ray on this machine"
    try:
        if address:
            _check_reachable(address)
        end = _begun(partial(_join, address) if address else partial(_start, config))
    except HybridflowError:
        raise
    except Exception as error:  # Ray raises plain ones, too
        raise PlacementError(f"could not {doing}: {error}. {_advice(address)}") from error
    try:
        yield
    except BaseException:
        interrupts.seen()
        raise
    finally:
        end()


def _join(address: str) -> None:
    ray.init(address, runtime_env=_search_path(), log_to_driver=True, logging_level=logging.ERROR)


def _start(config: Config) -> None:
    """On the loopback interface alone: the cluster is this machine. Ray has no setting for that on Linux, only a constant."""
    os.environ.setdefault(*NO_WAIT_FOR_WORKERS)
    num_cpus, before = cpu_slots_of_this_machine(config.placement.cpu_slots), ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    init = partial(ray.init, "local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=True)
    try:
        try:
            init(logging_level=logging.ERROR)
        except Exception as error:  # a plain one
            if "timed out" not in str(error):
                raise
            # Its limit of 30 s cannot be set, and a busy machine may need more.
            logger.info("Ray has not come up in its own time; once more")
            ray.shutdown()
            init(logging_level=logging.ERROR)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _begun(begin: Callable[[], None]) -> Callable[[], None]:
    """Begin with Ray on a thread that stays until what is returned is called: Ray may not answer at all, and processes that it
    starts end with the thread that has started them.

    Raises:
        CallTimeoutError: it does not come up within `CONNECT_TIMEOUT_S`.
    """
    has_begun, leaves, has_told = threading.Event(), threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def live() -> None:
        try:
            begin()
        except BaseException as error:  # raised again by whoever waits
            raised.append(error)
        has_begun.set()
        while not raised and not leaves.wait(LOOK_EVERY_S):
            if (ended := _ended_here()) and not has_told.is_set():
                has_told.set()
                text = f"Ray's {' and '.join(ended)} on this machine ended (killed, or out of memory); the run cannot go on"
                interrupts.fail(PlacementError(text))
        ray.shutdown()

    def end() -> None:
        leaves.set()
        try:
            wait_for_thread(thread, thread.join, lambda: not thread.is_alive(), SHUTDOWN_TIMEOUT_S, "ending Ray")
        except CallTimeoutError as error:
            logger.warning("%s. Its processes end with this one", error)

    thread = threading.Thread(target=live, name="hybridflow-ray", daemon=True)
    thread.start()
    doing = "connecting to Ray"
    with ended_after(CONNECT_TIMEOUT_S + LAST_WORD_S, doing):
        wait_for_thread(thread, has_begun.wait, has_begun.is_set, CONNECT_TIMEOUT_S, doing)
    if raised:
        raise raised[0]
    return end


def _ended_here() -> list[str]:
    """Of the processes with which this one has started Ray here, those that have ended. Ray notices after a minute, and
    then ends this process without a word."""
    node = ray_worker._global_node
    return [] if node is None else [str(kind) for kind, _ in node.dead_processes()]


def is_in_copied_folder() -> bool:
    """Whether the working folder is the copy that `ray job submit --working-dir` made, which Ray deletes after the run."""
    return "working_dir" in ray.get_runtime_context().runtime_env


def _check_reachable(address: str) -> None:
    """Knock at a `host:port`, since Ray itself tries for many minutes. Other addresses, such as `auto`, Ray resolves."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_TIMEOUT_S) as connection:
            answer = b"" if os.environ.get("RAY_USE_TLS", "0") == "1" else _answer_to_http2(connection)
    except (OSError, OverflowError) as error:
        found = "it accepts connections and says nothing" if isinstance(error, TimeoutError) else str(error)
        raise _no_cluster(address, found) from error
    if answer and answer[3:4] != HTTP2_SETTINGS:
        raise _no_cluster(address, f"what listens there is something else, it says {answer[:40]!r}")


def _answer_to_http2(connection: socket.socket) -> bytes:
    """What is said first to the greeting of HTTP/2, which Ray speaks: a frame of settings."""
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + HTTP2_SETTINGS + b"\0\0\0\0\0")
    return connection.recv(1024) or b"nothing, and closes the connection"


def _no_cluster(address: str, found: str) -> PlacementError:
    return PlacementError(
        f"no Ray cluster answers at {address}: {found}. Check run.ray_address (or RAY_ADDRESS), start the cluster with "
        "`ray start --head`, or leave the address out to start one on this machine"
    )


def _search_path() -> dict[str, dict[str, str]] | None:
    """Lets the ranks import what this process can, where they see its folders.

    What `ray job submit` runs has an environment already, with a copy of its working folder on every node.
    """
    if SUBMITTED_JOB in os.environ:
        return None
    folders = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {"env_vars": {"PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}}


def _advice(address: str | None) -> str:
    """What to do where Ray gives no connection: of a cluster that refuses one, it does not say why."""
    if not address:
        return "To use a cluster instead, start one with `ray start --head` and name it in run.ray_address"
    python = ".".join(platform.python_version_tuple()[:2])
    return (
        f"The cluster may have another release of Ray or Python (here {ray.__version__} and {python}), or want a token: set "
        "RAY_AUTH_MODE=token, and give all machines the same ~/.ray/auth_token (docs/cluster.md)"
    )
