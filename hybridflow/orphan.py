"""No process of a run outlives it: those that do its work end when the process that started them has ended."""

from __future__ import annotations

import os
import threading
import time

CHECK_EVERY_S = 1.0


def end_with_parent() -> None:
    """End this process, whatever it is busy with, soon after its parent has ended, however that happened."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(CHECK_EVERY_S)
    os._exit(1)
