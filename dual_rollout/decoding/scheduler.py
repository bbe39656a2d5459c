"""Which sequences advance together, and when."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from dual_rollout.decoding.record import Recorder
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tuner import Load
from dual_rollout.exceptions import DualRolloutError, EngineRejectedError


class Mode(Protocol):
    """A way to advance sequences: lockstep or block."""

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Give every sequence at least one token. A server's fault leaves all of them as they were."""
        ...


class Scheduler:
    """Continuous batching on the client: sequences come from `waiting`, and a finished one is replaced at once.

    The active sequences are split into groups that advance on their own, so that the servers work for one group while
    the client, or the other server, is busy with another. No round waits for the slowest of the whole batch.
    """

    def __init__(self, sequences: Iterable[DecodingSequence], recorder: Recorder):
        self._waiting = deque(sequences)
        self._recorder = recorder
        self._groups: list[list[DecodingSequence]] = []
        self._settling: list[asyncio.Task[None]] = []

    @property
    def load(self) -> Load:
        """Sequences that the next round will have in flight, and their longest context."""
        active = [sequence for group in self._groups for sequence in group]
        sequences = active + list(self._waiting)[: self._recorder.config.max_concurrency - len(active)]
        longest = max(max(len(s.context_theta), len(s.context_t)) for s in sequences)
        return Load.of(len(sequences), longest)

    async def run(self, mode: Mode, *, groups: int, rounds: int | None = None) -> None:
        """Advance every group by `rounds` rounds, or to the end of all sequences when None."""
        limit = self._recorder.config.max_concurrency
        active = [sequence for group in self._groups for sequence in group]
        while self._waiting and len(active) < limit:
            active.append(self._waiting.popleft())
        groups = max(1, min(groups, len(active)))
        self._groups = [active[i::groups] for i in range(groups)]
        await asyncio.gather(*(self._run_group(group, mode, rounds) for group in self._groups))

    async def finish(self) -> None:
        """Wait until the records of all finished sequences are complete."""
        await asyncio.gather(*self._settling)

    @property
    def done(self) -> bool:
        """Whether no sequence is left."""
        return not self._waiting and not any(self._groups)

    async def _run_group(self, group: list[DecodingSequence], mode: Mode, rounds: int | None) -> None:
        capacity = len(group)
        while group and rounds != 0:
            await advance(mode, group)
            ended = [sequence for sequence in group if sequence.done]
            self._settling += [asyncio.create_task(self._recorder.settle(sequence)) for sequence in ended]
            group[:] = [sequence for sequence in group if not sequence.done]
            while self._waiting and len(group) < capacity:
                group.append(self._waiting.popleft())
            rounds = None if rounds is None else rounds - 1


async def advance(mode: Mode, sequences: list[DecodingSequence]) -> None:
    """One round, with faults kept to the sequences they concern."""
    try:
        await mode.advance(sequences)
    except EngineRejectedError as error:
        if len(sequences) == 1:
            sequences[0].fail(error)
            return
        # One bad prompt makes a server refuse the whole list: find it, so that the others go on.
        middle = len(sequences) // 2
        await advance(mode, sequences[:middle])
        await advance(mode, sequences[middle:])
    except DualRolloutError as error:
        for sequence in sequences:
            sequence.fail(error)
