"""What the decoding of one call shares: the two models, the settings, the counts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.top_k_source import TopKSource
from dual_rollout.engine import ScoringEngine

A = TypeVar("A")
B = TypeVar("B")
OnToken = Callable[[DecodingSequence], None]
OnFinished = Callable[[DecodingSequence], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class CallSettings:
    """How the sequences of one call are drawn.

    Attributes:
        config: with the temperature, the seed, the rule for α and the concurrency of this call.
        with_diagnostics: whether records get diagnostics.
        on_token: called after each token.
        on_finished: awaited with each sequence whose record is complete; while it waits, fewer new ones are begun.
        streams: whether tokens are wanted as they come.
    """

    config: CoordinatorConfig
    with_diagnostics: bool = False
    on_token: OnToken | None = None
    on_finished: OnFinished | None = None
    streams: bool = False


class DecodingCall:
    """Both models and the settings of one call, for the modes and the scheduler.

    Attributes:
        theta, t: where the lists of each model come from; its engine is there too.
        config: that of `settings`.
        stats: counts over the coordinator's life.
    """

    def __init__(self, theta: ScoringEngine, t: ScoringEngine, settings: CallSettings, stats: DecodingStats):
        self.settings = settings
        self.config = settings.config
        self.stats = stats
        self.theta, self.t = (TopKSource(engine, settings.config, stats) for engine in (theta, t))

    def count_token(self, sequence: DecodingSequence) -> None:
        """Say that a sequence has one token more."""
        self.stats.tokens += 1
        if self.settings.on_token is not None:
            self.settings.on_token(sequence)


async def both(first: Awaitable[A], second: Awaitable[B]) -> tuple[A, B]:
    """Await both, and only then raise what failed, so that no request is left behind unwatched."""
    a, b = await asyncio.gather(first, second, return_exceptions=True)
    for result in (a, b):
        if isinstance(result, BaseException):
            raise result
    return a, b  # type: ignore[return-value]
