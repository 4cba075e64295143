"""The controller's own code has a limit too: an algorithm that hangs, or a disk that does not answer, ends the run.

Calls on groups have limits where they are waited for. What else runs on the main thread, such as `collect` and `learn` between
their calls or the files of a checkpoint, is watched from here.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hybridflow import interrupts
from hybridflow.config.schema import Config
from hybridflow.controller.boundary import ended_by
from hybridflow.controller.cost import CallLog
from hybridflow.controller.waiting import SECONDS_OF_SILENCE, thread_line, thread_text
from hybridflow.errors import CallTimeoutError

logger = logging.getLogger("hybridflow")

LOOK_EVERY_S = 1.0
BOUNDED = ("hybridflow/controller/waiting.py", "hybridflow/controller/weights.py", "hybridflow/trackers/base.py")
"""Files that wait with limits of their own. A stream does as well: `_next`."""
LAST_WORD_S = 30.0
"""After this a main thread that does not even take a signal is given up, and the process with it."""


@contextmanager
def watched(config: Config, log: CallLog) -> Iterator[None]:
    """In a block of `interrupts.noticed`: raise a CallTimeoutError in the main thread when it gets nowhere for `run.timeout_s`,
    neither calling nor waiting for a call. Elsewhere than in the main thread nothing happens."""
    main = threading.current_thread()
    if main is not threading.main_thread():
        yield
        return
    leaves = threading.Event()
    watch = threading.Thread(target=_watch, args=(main, config, log, leaves), name="hybridflow-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        leaves.set()
        watch.join(LOOK_EVERY_S)


def _watch(main: threading.Thread, config: Config, log: CallLog, leaves: threading.Event) -> None:
    late: CallTimeoutError | None = None
    limit_s, num_events, since = config.run.timeout_s, -1, time.monotonic()
    said = since
    while not leaves.wait(LOOK_EVERY_S):
        now = time.monotonic()
        if log.num_events != num_events or _waits_within_limits(main):
            num_events, since, said = log.num_events, now, now
        elif now - since >= limit_s and late is None:
            text = f"the controller's own code has got nowhere for run.timeout_s={limit_s:g} s; it is in "
            late = CallTimeoutError(f"{text}{thread_line(main.ident)}\nIf this takes long by nature, raise run.timeout_s")
            late.add_note(f"The main thread:\n{thread_text(main.ident)}")
            interrupts.fail(late)
        elif late is not None and now - since >= limit_s + LAST_WORD_S:
            os._exit(ended_by(late, config))
        elif now - said >= SECONDS_OF_SILENCE:
            said = now
            logger.info("the controller's own code is not done after %.0f s: %s", now - since, thread_line(main.ident))


def _waits_within_limits(main: threading.Thread) -> bool:
    frame = sys._current_frames().get(main.ident or 0)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(BOUNDED) or (
            code.co_name == "_next" and code.co_filename.endswith("controller/stream.py")
        ):
            return True
        frame = frame.f_back
    return False
