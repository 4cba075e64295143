"""The Ray cluster of a run: started on this machine, or joined where one is named."""

from __future__ import annotations

import logging
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from hybridflow.config.pools import cpu_slots_of_this_machine
from hybridflow.config.schema import Config
from hybridflow.errors import PlacementError

logger = logging.getLogger("hybridflow")

JOIN_TIMEOUT_S = 10.0
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
    try:
        if address:
            _check_reachable(address)
            ray.init(address, runtime_env=_search_path(), log_to_driver=True, logging_level=logging.ERROR)
        else:
            num_cpus = cpu_slots_of_this_machine(config.placement.cpu_slots)
            ray.init("local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=True, logging_level=logging.ERROR)
    except (ConnectionError, OSError, RuntimeError, ValueError, TimeoutError) as error:
        doing = f"join the Ray cluster at {address!r}" if address else "start Ray on this machine"
        raise PlacementError(f"could not {doing}: {error}. {_advice(address)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def is_in_copied_folder() -> bool:
    """Whether the working folder is the copy that `ray job submit --working-dir` made, which Ray deletes after the run."""
    return "working_dir" in ray.get_runtime_context().runtime_env


def _check_reachable(address: str) -> None:
    """Knock at a `host:port`, since Ray itself tries for many minutes. Other addresses, such as `auto`, Ray resolves."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=JOIN_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise PlacementError(
            f"no Ray cluster answers at {address}: {error}. Check run.ray_address (or RAY_ADDRESS), start the cluster with "
            "`ray start --head`, or leave the address out to start one on this machine"
        ) from error


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
