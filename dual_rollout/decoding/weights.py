"""π_θ's weights while sequences are drawn from them: no round sees two versions, and each token knows its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable

from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.exceptions import RolloutError


class PolicyWeights:
    """Rounds and changes of the weights exclude each other.

    Attributes:
        version: of the weights; None before any are counted.
    """

    def __init__(self) -> None:
        self.version: int | None = None
        self._rounds = 0
        self._idle, self._unchanging = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._unchanging.set()

    @contextlib.asynccontextmanager
    async def in_use(self, sequences: Iterable[DecodingSequence] = ()) -> AsyncIterator[None]:
        """For a round of `sequences`, all of whose requests the same weights answer."""
        while not self._unchanging.is_set():
            await self._unchanging.wait()
        self._rounds += 1
        self._idle.clear()
        try:
            for sequence in sequences:
                sequence.weight_version = self.version
            yield
        finally:
            self._rounds -= 1
            if not self._rounds:
                self._idle.set()

    @contextlib.asynccontextmanager
    async def changing(self, version: int) -> AsyncIterator[None]:
        """For a change to `version`: rounds under way are awaited, and others begin when it is over."""
        while not self._unchanging.is_set():
            await self._unchanging.wait()
        self._unchanging.clear()
        try:
            await self._idle.wait()
            yield
            self.version = version
        finally:
            self._unchanging.set()

    def refuse_mixed(self, sequence: DecodingSequence) -> None:
        """End a sequence with an error unless all of it, and the record that was just completed, is of `version`."""
        other = next((version for version in sequence.record.weight_versions if version != self.version), self.version)
        if other != self.version and sequence.failure is None:
            sequence.fail(
                RolloutError(
                    f"π_θ's weights changed from version {other} to {self.version} meanwhile: change them between "
                    "rollouts, or set allow_mixed_versions"
                )
            )
