"""Which sequences advance together, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from dual_rollout.decoding.call import DecodingCall
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.tuner import Load
from dual_rollout.decoding.unlisted_tokens import fetch_unlisted
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.engine import sent_once
from dual_rollout.exceptions import (
    DualRolloutError,
    EngineProtocolError,
    EngineRejectedError,
    EngineUnavailableError,
)


class Mode(Protocol):
    """A way to advance sequences: lockstep or block."""

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """Give every sequence at least one token. A server's fault leaves all of them as they were."""
        ...


class Scheduler:
    """Continuous batching on the client: a finished sequence is replaced at once by the next of `sequences`.

    The active sequences are split into groups that advance on their own, so that the servers work for one group while
    the client, or the other server, is busy with another. A round waits for the slowest of its group alone.

    `sequences` is consumed as places become free, and nothing is kept of what has finished, so there may be any number
    of them. One that is done before it begins, because its prompt was bad, takes no place. Once a server is gone for
    longer than the retries allow, no more are begun: they end with the same error.

    Attributes:
        tokens: sampled so far.
    """

    def __init__(
        self,
        sequences: Iterable[DecodingSequence],
        call: DecodingCall,
        weights: PolicyWeights,
    ):
        self._waiting = iter(sequences)
        self._call = call
        self._weights = weights
        self._gone: EngineUnavailableError | None = None
        self._groups: list[list[DecodingSequence]] = []
        self._completing: set[asyncio.Task[None]] = set()
        self.tokens = 0

    @property
    def load(self) -> Load:
        """Sequences that the next round will have in flight, and their longest context. Asked after a round."""
        active = [sequence for group in self._groups for sequence in group]
        return Load.of(len(active), max(max(len(s.context_theta), len(s.context_t)) for s in active))

    async def run(self, mode: Mode, *, groups: int, rounds: int | None = None) -> None:
        """Advance every group by `rounds` rounds, or to the end of all sequences when None."""
        active = [sequence for group in self._groups for sequence in group]
        await self._fill(active, self._call.config.concurrency)
        groups = max(1, min(groups, len(active)))
        self._groups = [active[i::groups] for i in range(groups)]
        tasks = [asyncio.create_task(self._run_group(group, mode, rounds)) for group in self._groups]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one that raised, as the caller's iterable may, ends the others
                task.cancel()

    async def finish(self) -> None:
        """Wait until the records of all finished sequences are complete."""
        while self._completing:
            await self._collect(asyncio.ALL_COMPLETED)

    def abandon(self) -> None:
        """Stop completing records: nobody waits for them any more."""
        for task in self._completing:
            task.cancel()

    @property
    def active(self) -> int:
        """Sequences in flight. Asked after a round."""
        return sum(map(len, self._groups))

    @property
    def done(self) -> bool:
        """Whether no sequence is left. Asked after a round."""
        return not self.active

    async def _run_group(self, group: list[DecodingSequence], mode: Mode, rounds: int | None) -> None:
        capacity = len(group)
        while group and rounds != 0:
            before = sum(len(sequence.tokens) for sequence in group)
            await self._round(mode, group)
            self.tokens += sum(len(sequence.tokens) for sequence in group) - before
            for sequence in group:
                if isinstance(sequence.failure, EngineUnavailableError):
                    self._gone = sequence.failure
                if sequence.done:
                    self._complete(sequence)
            group[:] = [sequence for sequence in group if not sequence.done]
            await self._fill(group, capacity)
            rounds = None if rounds is None else rounds - 1

    async def _round(self, mode: Mode, group: list[DecodingSequence]) -> None:
        self._weights.mark(group)
        await advance(mode, group)

    async def _fill(self, group: list[DecodingSequence], capacity: int) -> None:
        while len(group) < capacity:
            while len(self._completing) >= self._call.config.concurrency:
                await self._collect(asyncio.FIRST_COMPLETED)
            sequence = next(self._waiting, None)
            if sequence is None:
                return
            if self._gone is not None and not sequence.done:
                sequence.fail(self._gone)
            if sequence.done:
                self._complete(sequence)
            else:
                group.append(sequence)

    def _complete(self, sequence: DecodingSequence) -> None:
        """Complete the record aside, while the others go on."""

        async def complete() -> None:
            await fetch_unlisted(self._call, sequence)
            self._weights.refuse_mixed(sequence)
            if self._call.settings.on_finished is not None:
                await self._call.settings.on_finished(sequence)

        self._completing.add(asyncio.create_task(complete()))

    async def _collect(self, until: str) -> None:
        ended, _ = await asyncio.wait(self._completing, return_when=until)
        self._completing -= ended
        for task in ended:
            task.result()


async def advance(mode: Mode, sequences: list[DecodingSequence]) -> None:
    """One round, with faults kept to the sequences they concern."""
    try:
        await mode.advance(sequences)
    except DualRolloutError as error:
        with sent_once():
            faults = await _narrowed(mode, sequences, error)
        for sequence, fault in faults.items():
            sequence.fail(fault)


async def _narrowed(
    mode: Mode, sequences: list[DecodingSequence], error: DualRolloutError
) -> dict[DecodingSequence, DualRolloutError]:
    """Which sequences the error of a round concerns; the others are advanced.

    One bad prompt makes a server refuse a whole list, or answer it badly, however often it is sent. It is found by
    halving, and each half is sent once.
    """
    if len(sequences) == 1 or not isinstance(error, (EngineRejectedError, EngineProtocolError)):
        return dict.fromkeys(sequences, error)

    async def faults(half: list[DecodingSequence]) -> dict[DecodingSequence, DualRolloutError]:
        try:
            await mode.advance(half)
            return {}
        except DualRolloutError as error:
            return await _narrowed(mode, half, error)

    middle = len(sequences) // 2
    first, second = await asyncio.gather(faults(sequences[:middle]), faults(sequences[middle:]))
    return first | second
