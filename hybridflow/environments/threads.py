"""Plain functions called from an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable


def on_thread(method: Callable[..., object], *given: object) -> asyncio.Future[object]:
    """The result of a call on a daemon thread, which a process need not wait for to end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[object] = loop.create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def run() -> None:
        try:
            result = method(*given)
        except BaseException as error:
            if isinstance(error, StopIteration | KeyboardInterrupt | SystemExit):  # which no future can hold
                error = RuntimeError(f"raised {type(error).__name__}: {error}")
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)

    threading.Thread(target=run, daemon=True).start()
    return future
