"""Fetching top-k lists from one server: of `top_k` tokens, or with "auto" as long as the context needs.

With "auto", S at a position is a matter of its context alone: each list is cut to its fewest most likely tokens that
hold `top_k_mass`, whatever was asked for. How much is asked for only decides what that costs. A list that does not hold
the mass is asked for again, longer, up to the most that the server gives; what is missing then is the tail's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from dual_rollout.config import CoordinatorConfig, longest_list
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.engine import ScoringEngine, TokenIds
from dual_rollout.functional.top_k import TopK, most_likely, replaced, tokens_to_mass

_FEWEST_TOKENS = 16  # a shorter list would bound the tokens it lacks too loosely
_ASKED_FIRST = 128
_REMEMBERED = 1024  # lists
_ENOUGH_FOR = 0.75  # of them: what is asked for next


class TopKSource:
    """Asks one server for lists, and remembers how long they had to be.

    Attributes:
        engine: the server's client.
    """

    def __init__(self, engine: ScoringEngine, config: CoordinatorConfig, stats: DecodingStats):
        self.engine = engine
        self._config = config
        self._stats = stats
        self._steps: list[int] = []
        self._needs: deque[int] = deque(maxlen=_REMEMBERED)

    async def next_top_k(self, contexts: Sequence[TokenIds]) -> TopK:
        """The list after each of B contexts."""
        k = await self.length(contexts[0])
        top = await self.engine.next_top_k(contexts, k, self._config.temperature)
        return await self.complete(top, k, lambda: contexts)

    async def length(self, context: TokenIds) -> int:
        """How many tokens to ask for; `context` is for finding out what the server gives."""
        if self._config.top_k != "auto":
            return self._config.top_k
        if not self._steps:
            most = longest_list(self._config.top_k, (await self.engine.probe(context)).max_logprobs)
            doubled = (_FEWEST_TOKENS << i for i in range(most.bit_length()))
            self._steps = [k for k in doubled if k < most] + [most]
        if not self._needs:
            return min(_ASKED_FIRST, self._steps[-1])
        return self._step(float(np.quantile(self._needs, _ENOUGH_FOR)))

    async def complete(self, top: TopK, k: int, contexts: Callable[[], Sequence[TokenIds]]) -> TopK:
        """The lists that q* is built from, out of those that came when `k` tokens were asked for after `contexts`."""
        self._count(top)
        if self._config.top_k != "auto":
            return top
        top = await self._until_enough(top, k, contexts)
        counts = np.clip(tokens_to_mass(top, self._config.top_k_mass), self._steps[0], self._steps[-1])
        self._needs.extend(counts.tolist())
        return most_likely(top, counts)

    async def _until_enough(self, top: TopK, k: int, contexts: Callable[[], Sequence[TokenIds]]) -> TopK:
        """The same lists, those asked for again that hold neither `top_k_mass` nor all there is."""
        short = (tokens_to_mass(top, self._config.top_k_mass) > k) & (top.lengths >= k)
        if k >= self._steps[-1] or not short.any():
            return top
        rows, every = np.flatnonzero(short), contexts()
        longer, left = self._step(k + 1), [every[row] for row in rows]
        self._stats.repeated_lists += len(rows)
        again = await self.engine.next_top_k(left, longer, self._config.temperature)
        self._count(again)
        return replaced(top, rows, await self._until_enough(again, longer, lambda: left))

    def _step(self, tokens: float) -> int:
        """The shortest length that is asked for and has as many tokens."""
        return next(step for step in self._steps if step >= tokens)

    def _count(self, top: TopK) -> None:
        self._stats.received_tokens += int(top.lengths.sum())
