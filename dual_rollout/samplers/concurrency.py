"""Sequences that are each drawn by requests of their own, a limited number at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

from dual_rollout.decoding.call import CallSettings
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.exceptions import DualRolloutError, EngineUnavailableError

STREAMED_BLOCK = 16
"""Tokens drawn per request while streaming."""


async def draw_concurrently(
    sequences: Iterable[DecodingSequence],
    settings: CallSettings,
    weights: PolicyWeights,
    limit: int,
    extend: Callable[[DecodingSequence, CallSettings], Awaitable[None]],
) -> None:
    """Draw all sequences to their end, at most `limit` at once, each by as many calls of `extend` as it takes.

    A fault of one ends that sequence only; once the server is gone, those that are left end with the same error.
    """
    waiting = iter(sequences)
    gone: EngineUnavailableError | None = None

    async def draw_one_by_one() -> None:
        nonlocal gone
        for sequence in waiting:
            if gone is not None and not sequence.done:
                sequence.fail(gone)
            try:
                while not sequence.done:
                    weights.mark([sequence])
                    await extend(sequence, settings)
                weights.refuse_mixed(sequence)
            except DualRolloutError as error:
                sequence.fail(error)
                gone = error if isinstance(error, EngineUnavailableError) else gone
            if settings.on_finished is not None:
                await settings.on_finished(sequence)

    await asyncio.gather(*(draw_one_by_one() for _ in range(limit)))
