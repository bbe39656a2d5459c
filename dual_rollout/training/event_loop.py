"""An event loop in a background thread, for callers that are not asynchronous."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop in a daemon thread, which belongs to the process that made it: no thread survives a fork."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="dual-rollout", daemon=True)
        self._thread.start()

    @property
    def is_of_this_process(self) -> bool:
        return self._process == os.getpid()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What the coroutine returns or raises; blocks until then."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # on Ctrl-C the requests end with the caller
            raise

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """End the thread, after `last` has run in it. From within the thread, as garbage collection may call it, this
        only asks for the end, since it cannot wait for itself."""

        async def end() -> None:
            try:
                if last is not None:
                    await last
            finally:
                self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._loop.close()
