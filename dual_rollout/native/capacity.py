"""What a server has a limited number of: requests at once, blocks of its KV cache. Whoever needs some waits here."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence
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

    def has_room(self, count: int) -> bool:
        """Whether so many would be given at once."""
        return not self._waiting and min(count, self._count) <= self._free

    def _give(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            count, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._free -= count
                turn.set_result(None)


class CacheRoom:
    """Blocks of a KV cache for rollouts of two requests, which fall apart where one of them is preempted.

    How long a rollout gets is not known when it begins: at most its `max_tokens`, and once some have ended, no more is
    counted than twice the mean of these. Those that get longer may still be preempted.
    """

    def __init__(self, blocks: int, block_size: int):
        self._blocks, self._count = Places(blocks), blocks
        self._block_size = block_size
        self._mean: float | None = None

    @asynccontextmanager
    async def taken(self, prompt_lengths: Sequence[int], max_tokens: int) -> AsyncGenerator[None]:
        """The blocks of a rollout's requests, for the time of the block, once they are there."""
        async with self._blocks.taken(self._expected(prompt_lengths, max_tokens)):
            yield

    def has_room(self, prompt_lengths: Sequence[int], max_tokens: int) -> bool:
        """Whether such a rollout would begin at once."""
        return self._blocks.has_room(self._expected(prompt_lengths, max_tokens))

    def holds(self, prompt_lengths: Sequence[int], max_tokens: int) -> int:
        """How many such rollouts it holds at once, one at least."""
        return max(1, self._count // self._expected(prompt_lengths, max_tokens))

    def note(self, length: int) -> None:
        """A rollout has ended with so many tokens."""
        self._mean = float(length) if self._mean is None else 0.9 * self._mean + 0.1 * length

    def _expected(self, prompt_lengths: Sequence[int], max_tokens: int) -> int:
        """Blocks that a rollout will need."""
        length = max_tokens if self._mean is None else min(max_tokens, math.ceil(2.0 * self._mean))
        # One token more, since vLLM makes room for the next before it knows that there is none.
        return sum(-(-(prompt + length + 1) // self._block_size) for prompt in prompt_lengths)
