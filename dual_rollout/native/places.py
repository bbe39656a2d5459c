"""Places of a server, of which a rollout takes one or two: for whoever has to wait until there are enough."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager


class Places:
    """A number of places, given in the order in which they were asked for, so that nobody who needs two waits for ever.

    Args:
        count: how many; who asks for more than that takes all.
    """

    def __init__(self, count: int):
        self._count = self._free = max(1, count)
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, count: int) -> AsyncGenerator[None]:
        """`count` places for the time of the block, once they are there."""
        count = min(count, self._count)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        self._give()
        try:
            await turn
            yield
        finally:
            if turn.done() and not turn.cancelled():
                self._free += count
            elif (count, turn) in self._waiting:
                self._waiting.remove((count, turn))
            self._give()

    def _give(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            count, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= count
                turn.set_result(None)
