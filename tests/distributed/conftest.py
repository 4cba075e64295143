"""What ranks find imported."""

import multiprocessing

import pytest

from tests.distributed.ranks import PRELOADED, PRELOADED_WITH_VLLM


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the process that ranks are forked from is started, which is once in a session."""
    need_vllm = any(item.get_closest_marker("vllm") for item in session.items)
    multiprocessing.set_forkserver_preload(PRELOADED_WITH_VLLM if need_vllm else PRELOADED)
